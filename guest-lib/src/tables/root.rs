//! The root of a page table: what the hardware of an endpoint can start a walk from.

use pgtable_formats::context::{smmuv3, vtd};
use pgtable_formats::leaf::vmsav8::{Granule, Vmsav8, Vmsav8Flags, Vmsav8Params};
use pgtable_formats::{Gpa, Iova, TableAlloc};

use super::TableError;
use super::space::SpaceOptions;
use crate::Driver;
use crate::hal::{Platform, Transport};

/// A page table by its root, as the hardware is told of it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Table {
    Smmuv3 { cd: smmuv3::Cd, context: smmuv3::Context, format: Vmsav8 },
    Vtd(vtd::FirstStage),
}

/// Translates 48 bits of address: what every hardware has.
pub(super) const INPUT_BITS: u8 = 48;
/// Memory types by index: 0 normal write-back memory, 1 device memory (nGnRE).
const MAIR: u64 = 0x04ff;
pub(super) const MIN_ALLOC_LG2: u8 = 12;

impl Table {
    pub(super) fn smmuv3<P: Platform, T: Transport>(
        driver: &mut Driver<P, T>,
        caps: &smmuv3::Caps,
        options: SpaceOptions,
    ) -> Result<Self, TableError> {
        // The builder writes little-endian entries.
        if caps.endianness == smmuv3::TableEndianness::Big {
            return Err(TableError::Unsupported);
        }
        let granule = Granule::ALL
            .into_iter()
            .filter(|granule| match granule {
                Granule::K4 => caps.granule_4k,
                Granule::K16 => caps.granule_16k,
                Granule::K64 => caps.granule_64k,
            })
            .find(|granule| options.page_lg2.is_none_or(|page_lg2| page_lg2 == granule.lg2()))
            .ok_or(TableError::Unsupported)?;
        let root_lg2 = Vmsav8Params {
            root: Gpa(0),
            granule,
            input_lg2: INPUT_BITS,
            output_lg2: caps.oas_bits,
            wide: false,
            upper: false,
            flags: Vmsav8Flags::empty(),
        }
        .root_lg2()
        .max(MIN_ALLOC_LG2);
        let last_asid = if caps.asid16 { u16::MAX } else { u16::from(u8::MAX) };
        let asid = driver.asids.take(last_asid.into()).ok_or(TableError::NoTag)?;
        let (_, alloc) = driver.platform.parts();
        let Some(root) = alloc.alloc(root_lg2) else {
            driver.asids.release(asid);
            return Err(TableError::NoMemory);
        };
        let spec = smmuv3::CdSpec {
            asid: u16::try_from(asid).map_err(|_| TableError::NoTag)?,
            lower: Some(smmuv3::HalfSpec { root, granule, input_bits: INPUT_BITS }),
            upper: None,
            output_bits: caps.oas_bits,
            ds: false,
            mair: MAIR,
        };
        let made = spec.encode(caps).ok().and_then(|cd| {
            let context = smmuv3::context_from_cd(&cd.words(), caps, cd.word0.stall()).ok()?;
            Some(Self::Smmuv3 { cd, context, format: *context.half(Iova(0))? })
        });
        made.ok_or_else(|| {
            alloc.free(root, root_lg2);
            driver.asids.release(asid);
            TableError::Unsupported
        })
    }

    pub(super) fn vtd<P: Platform, T: Transport>(
        driver: &mut Driver<P, T>,
        caps: &vtd::Caps,
        options: SpaceOptions,
    ) -> Result<Self, TableError> {
        if options.page_lg2.is_some_and(|page_lg2| page_lg2 != MIN_ALLOC_LG2) {
            return Err(TableError::Unsupported);
        }
        let (_, alloc) = driver.platform.parts();
        let root = alloc.alloc(MIN_ALLOC_LG2).ok_or(TableError::NoMemory)?;
        let flags = vtd::FirstStageFlags::empty();
        vtd::FirstStage::new(root, flags, INPUT_BITS.into(), caps).map(Self::Vtd).map_err(|_| {
            alloc.free(root, MIN_ALLOC_LG2);
            TableError::Unsupported
        })
    }

    /// log2 of the bytes that the root takes.
    pub(super) const fn root_lg2(&self) -> u8 {
        match self {
            Self::Smmuv3 { format, .. } => format.params().root_lg2(),
            Self::Vtd(_) => MIN_ALLOC_LG2,
        }
    }
}

/// Whether a valid leaf may be replaced by a table without taking it out first: break-before-make level 2.
pub(super) const fn can_split(caps: &smmuv3::Caps) -> bool {
    smmuv3::Idr3::from_bits(caps.registers().idr3).bbml() >= 2
}
