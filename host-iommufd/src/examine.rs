//! What the kernel answers about a device, asked by making and dropping each object that a handover needs.
//!
//! Nothing is attached: the device goes on as it was. Each answer is kept with its error number, so that the first that
//! failed says what stands in the way.
//!
//! Not asked: attaching, PASIDs, faults of real accesses.

use nix::errno::Errno;

use crate::kernel::{DeviceId, HwInfo, HwKind, HwptData, HwptFlags, HwptSpec, Iommufd, ObjectId, ViommuKind};

/// What the kernel answered. `None`: it was not asked, because an earlier answer made it pointless, or because this kind
/// of IOMMU has no such thing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Examined {
    /// `IOMMU_GET_HW_INFO`.
    pub hw_info: Option<Result<HwInfo, Errno>>,
    /// A table for memory that guests' tables can be nested in.
    pub nest_parent: Option<Result<(), Errno>>,
    /// The guest's slice of the IOMMU (SMMUv3).
    pub viommu: Option<Result<(), Errno>>,
    /// A queue of the faults in the guest's tables (SMMUv3).
    pub events: Option<Result<(), Errno>>,
    /// A guest's table: on SMMUv3 one that aborts everything, on VT-d one whose root is address 0.
    pub nested: Option<Result<(), Errno>>,
}

impl Examined {
    /// Whether the kernel takes guests' tables for this device.
    pub fn takes_tables(&self) -> bool {
        matches!(self.nested, Some(Ok(())))
    }

    /// The registers of the IOMMU, where they were told.
    pub fn hardware(&self) -> Option<HwInfo> {
        self.hw_info.and_then(Result::ok)
    }
}

/// Asks about `device`, and leaves nothing behind.
pub fn examine(kernel: &impl Iommufd, device: DeviceId) -> Examined {
    let mut examination = Examination { kernel, device, made: Vec::new(), answers: Examined::default() };
    // Which question ended it is in the answers.
    let _ = examination.ask();
    for &object in examination.made.iter().rev() {
        if let Err(errno) = kernel.destroy(object) {
            tracing::warn!(object = object.0, %errno, "an object of the examination stays until the end");
        }
    }
    examination.answers
}

struct Examination<'a, K> {
    kernel: &'a K,
    device: DeviceId,
    /// In order of their making.
    made: Vec<ObjectId>,
    answers: Examined,
}

impl<K: Iommufd> Examination<'_, K> {
    fn ask(&mut self) -> Result<(), Errno> {
        let info = self.kernel.hw_info(self.device);
        self.answers.hw_info = Some(info);

        let ioas = self.kernel.alloc_ioas();
        let ioas = self.keep(ioas)?;
        let parent = self.table(ioas, HwptFlags::NEST_PARENT, HwptData::None);
        self.answers.nest_parent = Some(parent.map(drop));
        let parent = self.keep(parent)?;

        let nested = match info?.kind {
            HwKind::Smmuv3 { .. } => {
                let viommu = self.kernel.alloc_viommu(ViommuKind::Smmuv3, self.device, parent);
                self.answers.viommu = Some(viommu.map(drop));
                let viommu = self.keep(viommu)?;
                let events = self.kernel.alloc_event_queue(viommu, ViommuKind::Smmuv3, 1);
                self.answers.events = Some(events.map(drop));
                self.made.extend(events);
                self.table(viommu, HwptFlags::empty(), HwptData::Smmuv3([0, 0]))
            }
            HwKind::Vtd { .. } => {
                let table = HwptData::Vtd { flags: 0, root: 0, address_width: 48 };
                self.table(parent, HwptFlags::empty(), table)
            }
            HwKind::None | HwKind::Amd { .. } | HwKind::Other(_) => return Ok(()),
        };
        self.answers.nested = Some(nested.map(drop));
        self.keep(nested).map(drop)
    }

    fn table(&self, parent: ObjectId, flags: HwptFlags, data: HwptData) -> Result<ObjectId, Errno> {
        self.kernel.alloc_hwpt(&HwptSpec { device: self.device, parent, flags, data, fault_queue: None })
    }

    fn keep(&mut self, object: Result<ObjectId, Errno>) -> Result<ObjectId, Errno> {
        self.made.extend(object);
        object
    }
}

#[cfg(test)]
mod tests {
    use pgtable_formats::context::vtd::Ecap;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::failing::Failing;
    use crate::fake::{FakeDevice, FakeIommufd, FakeMemory, FakeSmmuv3, FakeVtd, Kernel, Unit};

    fn fake(kernel: Kernel, unit: Unit) -> (FakeIommufd<FakeMemory>, DeviceId) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let fake = FakeIommufd::with_kernel(FakeMemory::new(&memory), kernel);
        let unit = fake.add_unit(unit);
        let device = fake.add_device(FakeDevice::on(unit));
        (fake, device)
    }

    fn examined(kernel: Kernel, unit: Unit) -> Examined {
        let (fake, device) = fake(kernel, unit);
        let examined = examine(&fake, device);
        assert_eq!(fake.describe(), Vec::<String>::new());
        assert_eq!(fake.violations(), Vec::<String>::new());
        assert_eq!(fake.attached(device, None), None);
        examined
    }

    #[test]
    fn capable_hardware_takes_tables() {
        let smmuv3 = examined(Kernel::NEWEST, Unit::emulated_smmuv3());
        assert!(smmuv3.takes_tables());
        assert_eq!((smmuv3.viommu, smmuv3.events), (Some(Ok(())), Some(Ok(()))));
        assert!(matches!(smmuv3.hardware().unwrap().kind, HwKind::Smmuv3 { .. }));
        let vtd = examined(Kernel::NEWEST, Unit::vtd());
        assert!(vtd.takes_tables());
        assert_eq!(vtd.viommu, None);
    }

    #[test]
    fn the_first_refusal_says_what_is_missing() {
        let Unit::Smmuv3(smmuv3) = Unit::emulated_smmuv3() else { unreachable!() };
        let incoherent = Unit::Smmuv3(FakeSmmuv3 { coherent: false, ..smmuv3 });
        let answers = examined(Kernel::NEWEST, incoherent);
        assert_eq!(answers.nest_parent, Some(Ok(())));
        assert_eq!(answers.viommu, Some(Err(Errno::EOPNOTSUPP)));
        assert_eq!((answers.nested, answers.takes_tables()), (None, false));

        let Unit::Vtd(vtd) = Unit::vtd() else { unreachable!() };
        let ecap = Ecap::from_bits(vtd.ecap).with_nest(false).into_bits();
        let answers = examined(Kernel::NEWEST, Unit::Vtd(FakeVtd { ecap, ..vtd }));
        assert_eq!((answers.nest_parent, answers.nested), (Some(Err(Errno::EOPNOTSUPP)), None));

        assert!(!examined(Kernel::NEWEST, Unit::Plain).takes_tables());
    }

    #[test]
    fn old_kernels_answer_as_they_can() {
        let answers = examined(Kernel { viommu: false, ..Kernel::NEWEST }, Unit::emulated_smmuv3());
        assert_eq!(answers.viommu, Some(Err(Errno::ENOTTY)));
        let answers = examined(Kernel { event_queues: false, ..Kernel::NEWEST }, Unit::emulated_smmuv3());
        assert_eq!(answers.events, Some(Err(Errno::ENOTTY)));
        assert!(answers.takes_tables());
    }

    /// Whichever call fails, nothing stays behind.
    #[test]
    fn nothing_is_left_behind() {
        for unit in [Unit::emulated_smmuv3(), Unit::vtd()] {
            for number in 0..7 {
                let (fake, device) = fake(Kernel::NEWEST, unit);
                let kernel = Failing::new(fake);
                kernel.fail_nth(number, Errno::ENOMEM);
                examine(&kernel, device);
                assert_eq!(kernel.inner().describe(), Vec::<String>::new(), "{unit:?}, call {number}");
            }
        }
    }
}
