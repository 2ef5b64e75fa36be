//! What streams translate through.

use std::sync::{Arc, Weak};

use nix::errno::Errno;
use pgtable_formats::{Iova, IovaRange};
use viommu_device::host::{HostError, MapError, UnmapError};
use viommu_device::mapping::{MapFlags, Mapping, Mappings};
use viommu_wire::EndpointId;

use crate::error::host_error;
use crate::guest_memory::GuestMemory;
use crate::kernel::{DeviceId, IoasMapping, Iommufd};
use crate::objects::{Hwpt, Ioas, Session};
use crate::unit::{Table, Unit, UnitId};

/// A space of an [`IommufdHost`](crate::IommufdHost).
///
/// Its objects in the kernel are freed when it is destroyed, or dropped, and no endpoint is attached to them any more.
pub struct Space<K: Iommufd>(pub(crate) Kind<K>);

pub(crate) enum Kind<K: Iommufd> {
    /// The bypass of each endpoint's unit.
    Identity,
    Mapped(Box<Mapped<K>>),
    Table {
        /// Whose streams it is for.
        endpoint: EndpointId,
        table: Table<K>,
    },
}

impl<K: Iommufd> Space<K> {
    /// Whether it can be used there: the numbers of its objects mean something else to another kernel.
    pub(crate) fn is_of(&self, session: &Arc<Session<K>>) -> bool {
        match &self.0 {
            Kind::Identity => true,
            Kind::Mapped(mapped) => mapped.ioas.is_of(session),
            Kind::Table { table, .. } => table.hwpt.is_of(session),
        }
    }
}

impl<K: Iommufd> std::fmt::Debug for Space<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match &self.0 {
            Kind::Identity => "Identity",
            Kind::Mapped(_) => "Mapped",
            Kind::Table { .. } => "Table",
        })
    }
}

/// What MAP requests created: an address space of the kernel, and a table of it for each unit that has a stream there.
pub(crate) struct Mapped<K: Iommufd> {
    ioas: Arc<Ioas<K>>,
    mappings: Mappings,
    /// Held by the streams that are attached to them: a table that nobody uses costs on each MAP.
    tables: Vec<(UnitId, Weak<Hwpt<K>>)>,
    /// Part of a mapping that was refused, and that the kernel did not take back.
    leftover: Option<IovaRange>,
}

impl<K: Iommufd> Mapped<K> {
    pub(crate) fn new(session: &Arc<Session<K>>) -> Result<Self, HostError> {
        let ioas = Ioas::new(session).map_err(host_error)?;
        Ok(Self { ioas, mappings: Mappings::new(), tables: Vec::new(), leftover: None })
    }

    /// The table for devices of `unit`, `device` among them.
    pub(crate) fn table(&mut self, unit: &Unit<K>, device: DeviceId) -> Result<Arc<Hwpt<K>>, HostError> {
        self.tables.retain(|(_, table)| table.strong_count() > 0);
        let found = self.tables.iter().find(|(id, _)| *id == unit.id);
        if let Some(table) = found.and_then(|(_, table)| table.upgrade()) {
            return Ok(table);
        }
        let table = unit.mapped(&self.ioas, device).map_err(host_error)?;
        self.tables.push((unit.id, Arc::downgrade(&table)));
        Ok(table)
    }

    pub(crate) fn overlaps(&self, range: IovaRange) -> bool {
        self.mappings.overlaps(range)
    }

    /// All of `mapping` or nothing.
    pub(crate) fn map(&mut self, memory: &GuestMemory, mapping: Mapping) -> Result<(), MapError> {
        self.remove_leftover()?;
        if self.mappings.overlaps(mapping.range) {
            return Err(MapError::Overlap);
        }
        let pieces = memory.pieces(&mapping).ok_or(HostError::BadAddress)?;
        // What permits nothing is nothing to the kernel, which refuses it.
        if mapping.flags.intersects(MapFlags::READ | MapFlags::WRITE) {
            self.map_pieces(mapping.range.start(), pieces)?;
        }
        self.mappings.insert(mapping).map_err(|_| MapError::Overlap)
    }

    fn map_pieces(
        &mut self,
        start: Iova,
        pieces: impl Iterator<Item = IoasMapping>,
    ) -> Result<(), HostError> {
        let mut done = None;
        for piece in pieces {
            if let Err(errno) = self.ioas.map(&piece) {
                tracing::debug!(range = %piece.range, %errno, "not mapped");
                self.leftover = done;
                // What stays is tried again before anything else happens to the space.
                let _ = self.remove_leftover();
                return Err(host_error(errno));
            }
            done = IovaRange::new(start, piece.range.last());
        }
        Ok(())
    }

    /// All mappings inside `range`, or none.
    pub(crate) fn unmap(&mut self, memory: &GuestMemory, range: IovaRange) -> Result<usize, UnmapError> {
        self.remove_leftover()?;
        let ends = [range.start(), range.last()].map(|end| self.mappings.lookup(end));
        if ends.into_iter().flatten().any(|mapping| !range.covers(mapping.range)) {
            return Err(UnmapError::Split);
        }
        if !self.mappings.overlaps(range) {
            return Ok(0);
        }
        match self.ioas.unmap(range) {
            // Nothing is there where all mappings permit nothing.
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(errno) => {
                tracing::debug!(%range, %errno, "not unmapped");
                self.restore(memory, range);
                return Err(host_error(errno).into());
            }
        }
        self.mappings.remove(range).map_err(|_| UnmapError::Split)
    }

    /// After an unmap that may have removed some of the mappings in `range`.
    fn restore(&self, memory: &GuestMemory, range: IovaRange) {
        for mapping in self.mappings.overlapping(range) {
            if !mapping.flags.intersects(MapFlags::READ | MapFlags::WRITE) {
                continue;
            }
            for piece in memory.pieces(&mapping).into_iter().flatten() {
                match self.ioas.map(&piece) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    // Accesses fault there, though the guest sees a mapping: closed rather than open.
                    Err(errno) => tracing::warn!(range = %piece.range, %errno, "mapping lost"),
                }
            }
        }
    }

    fn remove_leftover(&mut self) -> Result<(), HostError> {
        let Some(range) = self.leftover else { return Ok(()) };
        match self.ioas.unmap(range) {
            Ok(_) | Err(Errno::ENOENT) => {
                self.leftover = None;
                Ok(())
            }
            Err(errno) => {
                tracing::warn!(%range, %errno, "part of a refused mapping stays, to be removed later");
                Err(host_error(errno))
            }
        }
    }

    /// As a kernel that stops half-way would.
    #[cfg(test)]
    pub(crate) fn unmap_behind_its_back(&self, range: IovaRange) {
        self.ioas.unmap(range).unwrap();
    }
}
