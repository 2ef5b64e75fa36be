//! The records that are read from the files of event and fault queues, and the answers that are written.

use iommufd_bindings::iommufd::{
    iommu_hwpt_page_response, iommu_hwpt_pgfault, iommu_vevent_arm_smmuv3,
    iommu_veventq_flag_IOMMU_VEVENTQ_FLAG_LOST_EVENTS as FLAG_LOST_EVENTS,
    iommufd_page_response_code_IOMMUFD_PAGE_RESP_INVALID as RESP_INVALID,
    iommufd_page_response_code_IOMMUFD_PAGE_RESP_SUCCESS as RESP_SUCCESS, iommufd_vevent_header,
};

use crate::kernel::{DeviceId, Event, PageFault, ResponseCode};

const HEADER_LENGTH: usize = size_of::<iommufd_vevent_header>();
const SMMUV3_EVENT_LENGTH: usize = size_of::<iommu_vevent_arm_smmuv3>();

/// Length of an SMMUv3 event with its header, in bytes.
pub(super) const SMMUV3_RECORD_LENGTH: usize = HEADER_LENGTH + SMMUV3_EVENT_LENGTH;

/// Length of a page request, in bytes.
pub(super) const PAGE_FAULT_LENGTH: usize = size_of::<iommu_hwpt_pgfault>();

/// Length of an answer, in bytes.
pub(super) const RESPONSE_LENGTH: usize = size_of::<iommu_hwpt_page_response>();

/// What a read of an SMMUv3 event queue gave. Each record is a header and an event, but for that of lost events, which
/// is a header alone. `None` where the bytes end within a record, which the kernel never does.
pub(super) fn smmuv3_events(mut bytes: &[u8]) -> Option<Vec<Event>> {
    let mut events = Vec::with_capacity(bytes.len() / SMMUV3_RECORD_LENGTH);
    while !bytes.is_empty() {
        let (header, rest) = bytes.split_first_chunk::<HEADER_LENGTH>()?;
        let flags = native32(header, 0)?;
        let sequence = native32(header, 4)?;
        bytes = rest;
        if flags & FLAG_LOST_EVENTS != 0 {
            events.push(Event::Lost { sequence });
            continue;
        }
        let (event, rest) = bytes.split_first_chunk::<SMMUV3_EVENT_LENGTH>()?;
        let mut record = [0; 4];
        for (word, bytes) in record.iter_mut().zip(event.as_chunks::<8>().0) {
            // The record is the hardware's own, little-endian on any host.
            *word = u64::from_le_bytes(*bytes);
        }
        bytes = rest;
        events.push(Event::Smmuv3 { sequence, record });
    }
    Some(events)
}

/// What a read of a fault queue gave. `None` where the bytes end within a record.
pub(super) fn page_faults(bytes: &[u8]) -> Option<Vec<PageFault>> {
    let (records, rest) = bytes.as_chunks::<PAGE_FAULT_LENGTH>();
    if !rest.is_empty() {
        return None;
    }
    records.iter().map(page_fault).collect()
}

fn page_fault(record: &[u8; PAGE_FAULT_LENGTH]) -> Option<PageFault> {
    Some(PageFault {
        flags: native32(record, 0)?,
        device: DeviceId(native32(record, 4)?),
        pasid: native32(record, 8)?,
        group: native32(record, 12)?,
        permissions: native32(record, 16)?,
        address: u64::from_ne_bytes(*record.get(24..)?.first_chunk()?),
        cookie: native32(record, 36)?,
    })
}

/// What is written to a fault queue.
pub(super) fn response(cookie: u32, code: ResponseCode) -> [u8; RESPONSE_LENGTH] {
    let code = match code {
        ResponseCode::Success => RESP_SUCCESS,
        ResponseCode::Invalid => RESP_INVALID,
    };
    let mut bytes = [0; RESPONSE_LENGTH];
    let (first, second) = bytes.split_at_mut(4);
    first.copy_from_slice(&cookie.to_ne_bytes());
    second.copy_from_slice(&code.to_ne_bytes());
    bytes
}

fn native32(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u32, sequence: u32) -> Vec<u8> {
        [flags.to_ne_bytes(), sequence.to_ne_bytes()].concat()
    }

    fn event(sequence: u32, record: [u64; 4]) -> Vec<u8> {
        let mut bytes = header(0, sequence);
        bytes.extend(record.iter().flat_map(|word| word.to_le_bytes()));
        bytes
    }

    // F_TRANSLATION of vSID 0x42 at 0x2000_0000, as a kernel 7.3 with QEMU's SMMU gave it.
    const TRANSLATION: [u64; 4] = [0x42_0000_0010, 0x200_0000_0000, 0x2000_0000, 0];

    #[test]
    fn events_with_their_sequence() {
        let bytes = [event(0, TRANSLATION), event(i32::MAX as u32, [1, 2, 3, 4])].concat();
        assert_eq!(bytes.len(), 80);
        assert_eq!(
            smmuv3_events(&bytes),
            Some(vec![
                Event::Smmuv3 { sequence: 0, record: TRANSLATION },
                Event::Smmuv3 { sequence: 0x7fff_ffff, record: [1, 2, 3, 4] },
            ])
        );
    }

    #[test]
    fn a_record_of_lost_events_has_no_payload() {
        let bytes = [header(1, 5), event(6, TRANSLATION), header(1, 9)].concat();
        assert_eq!(
            smmuv3_events(&bytes),
            Some(vec![
                Event::Lost { sequence: 5 },
                Event::Smmuv3 { sequence: 6, record: TRANSLATION },
                Event::Lost { sequence: 9 },
            ])
        );
    }

    #[test]
    fn no_events() {
        assert_eq!(smmuv3_events(&[]), Some(vec![]));
        assert_eq!(page_faults(&[]), Some(vec![]));
    }

    #[test]
    fn records_are_never_cut() {
        let bytes = event(0, TRANSLATION);
        for length in 1..bytes.len() {
            assert_eq!(smmuv3_events(&bytes[..length]), None, "{length} bytes");
        }
        assert_eq!(page_faults(&[0; 39]), None);
        assert_eq!(page_faults(&[0; 41]), None);
    }

    #[test]
    fn page_requests() {
        let mut bytes = Vec::new();
        // flags, dev_id, pasid, grpid, perm, reserved
        for word in [3u32, 7, 0xf_ffff, 0x1ff, 3, 0xdead] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(0xffff_8000_1234_5000u64.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(0x55u32.to_ne_bytes());
        let fault = PageFault {
            flags: 3,
            device: DeviceId(7),
            pasid: 0xf_ffff,
            group: 0x1ff,
            permissions: 3,
            address: 0xffff_8000_1234_5000,
            cookie: 0x55,
        };
        assert_eq!(page_faults(&bytes), Some(vec![fault]));
        assert_eq!(page_faults(&bytes.repeat(3)), Some(vec![fault; 3]));
    }

    #[test]
    fn responses() {
        assert_eq!(response(0, ResponseCode::Success), [0; 8]);
        let invalid = [7u32.to_ne_bytes(), 1u32.to_ne_bytes()].concat();
        assert_eq!(response(7, ResponseCode::Invalid).to_vec(), invalid);
    }
}
