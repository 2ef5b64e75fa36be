//! Accesses that are recorded.

use std::fmt;
use std::sync::Arc;

use viommu_device::Iova;
use viommu_device::host::FaultCause;
use viommu_device::wire::AccessFlags;
use vm_memory::iommu::{Error, IotlbIterator};
use vm_memory::{GuestAddress, Iommu, Permissions};

use super::{Accessed, Event, Outcome, Recorder};
use crate::translated::{Pinned, StreamIommu, Translate};

/// A [`StreamIommu`] whose accesses are recorded, as long as there is a recorder.
pub struct RecordedIommu<T> {
    iommu: StreamIommu<T>,
    recorder: Option<Arc<dyn Recorder>>,
}

impl<T> StreamIommu<T> {
    /// The same accesses, each told to `recorder`.
    pub fn recorded(self, recorder: Option<Arc<dyn Recorder>>) -> RecordedIommu<T> {
        RecordedIommu { iommu: self, recorder }
    }
}

impl<T> RecordedIommu<T> {
    /// Tells `recorder` from now on, or nobody.
    pub fn set_recorder(&mut self, recorder: Option<Arc<dyn Recorder>>) {
        self.recorder = recorder;
    }

    /// The accesses, without a recorder.
    pub fn inner(&self) -> &StreamIommu<T> {
        &self.iommu
    }
}

impl<T: Translate + Send> Iommu for RecordedIommu<T> {
    type IotlbGuard<'a>
        = Pinned<'a, T>
    where
        T: 'a;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Pinned<'_, T>>, Error> {
        let Some(recorder) = &self.recorder else { return self.iommu.translate(iova, length, access) };
        self.iommu.translate_observed(iova, length, access, |result| {
            // Longer ones are refused before.
            let length = u32::try_from(length).unwrap_or(u32::MAX);
            let result: Result<(), FaultCause> = result;
            recorder.record(Event::Access(Accessed {
                stream: self.iommu.stream(),
                iova: Iova(iova.0),
                length,
                access: flags(access, self.iommu.is_privileged()),
                outcome: Outcome::from(result),
            }));
        })
    }
}

impl<T> Clone for RecordedIommu<T> {
    fn clone(&self) -> Self {
        Self { iommu: self.iommu.clone(), recorder: self.recorder.clone() }
    }
}

impl<T> fmt::Debug for RecordedIommu<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordedIommu")
            .field("iommu", &self.iommu)
            .field("recording", &self.recorder.is_some())
            .finish()
    }
}

/// What an access does, as it is recorded.
pub(super) fn flags(access: Permissions, privileged: bool) -> AccessFlags {
    let mut flags = match access {
        Permissions::No => AccessFlags::empty(),
        Permissions::Read => AccessFlags::READ,
        Permissions::Write => AccessFlags::WRITE,
        Permissions::ReadWrite => AccessFlags::READ | AccessFlags::WRITE,
    };
    flags.set(AccessFlags::PRIVILEGED, privileged);
    flags
}
