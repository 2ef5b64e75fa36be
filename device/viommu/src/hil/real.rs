//! The machine that the program runs on.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use viommu_host_iommufd::Device;
use viommu_host_iommufd::counted::Counted;
use viommu_host_iommufd::engine::{self, Interrupt};
use viommu_host_iommufd::kernel::DeviceId;
use viommu_host_iommufd::sys::Sys;
use viommu_host_iommufd::sysfs::{Bdf, Root};
use viommu_wire::EndpointId;
use vm_memory::GuestMemoryMmap;

use super::bench::{Bench, Controls, Interrupts, Station, by_name};
use super::check::skip;

/// See the [module](self).
pub(super) struct RealBench {
    devices: Vec<Bdf>,
    taken: Option<Taken>,
    /// Of kernels that were given back.
    earlier: BTreeMap<&'static str, u64>,
}

/// What other processes cannot have meanwhile.
struct Taken {
    /// Dropped before the kernel, which they are bound to.
    stations: Vec<Station>,
    kernel: Arc<Counted<Sys>>,
}

impl RealBench {
    /// Takes the devices.
    ///
    /// # Errors
    /// What is missing, and what to do.
    pub(super) fn new(devices: &[Bdf]) -> anyhow::Result<Self> {
        let taken = Some(Taken::take(devices)?);
        Ok(Self { devices: devices.to_vec(), taken, earlier: BTreeMap::new() })
    }

    fn taken(&self) -> anyhow::Result<&Taken> {
        self.taken.as_ref().context("the devices were given back")
    }
}

impl Taken {
    fn take(devices: &[Bdf]) -> anyhow::Result<Self> {
        let kernel = Arc::new(Counted::new(Sys::open()?));
        let stations = devices.iter().map(|&bdf| station(&kernel, bdf));
        Ok(Self { stations: stations.collect::<anyhow::Result<_>>()?, kernel })
    }
}

fn station(kernel: &Arc<Counted<Sys>>, bdf: Bdf) -> anyhow::Result<Station> {
    let (id, handle) = kernel.inner().bind(&folder(bdf))?;
    let engine = engine::probe(&handle).with_context(|| format!("{bdf} cannot be made to do DMA"))?;
    let device = Device::on_pci(id, &Root::here(), bdf)
        .with_context(|| format!("the reserved regions of {bdf} cannot be read"))?;
    let endpoint = EndpointId(bdf.segment << 16 | u32::from(bdf.requester));
    let controls = Box::new(RealControls { kernel: kernel.clone(), device: id, bdf });
    Ok(Station::new(endpoint, device, engine, controls))
}

fn folder(bdf: Bdf) -> PathBuf {
    PathBuf::from(format!("/sys/bus/pci/devices/{bdf}"))
}

impl Bench for RealBench {
    type Kernel = Sys;

    fn kernel(&self) -> anyhow::Result<Arc<Counted<Sys>>> {
        Ok(self.taken()?.kernel.clone())
    }

    fn ioctls(&self) -> BTreeMap<&'static str, u64> {
        let mut sum = self.earlier.clone();
        for (name, count) in self.taken.iter().flat_map(|taken| by_name(&taken.kernel)) {
            *sum.entry(name).or_default() += count;
        }
        sum
    }

    fn count(&self) -> usize {
        self.devices.len()
    }

    fn name(&self, index: usize) -> String {
        self.devices.get(index).map_or_else(|| format!("device {index}"), Bdf::to_string)
    }

    fn station(&mut self, index: usize) -> anyhow::Result<&mut Station> {
        let taken = self.taken.as_mut().context("the devices were given back")?;
        taken.stations.get_mut(index).context("there is no such device")
    }

    fn memory_is(&mut self, _: &GuestMemoryMmap) {}

    fn settle(&mut self) -> anyhow::Result<()> {
        if self.taken.is_none() {
            self.take_again()?;
        }
        Ok(())
    }

    fn worker(&self, index: usize) -> Option<Command> {
        let mut command = Command::new(std::env::current_exe().ok()?);
        command.args(["hil", "--child", "--device", &self.name(index)]);
        Some(command)
    }

    fn let_go(&mut self) {
        self.earlier = self.ioctls();
        self.taken = None;
    }

    fn take_again(&mut self) -> anyhow::Result<()> {
        self.let_go();
        self.taken = Some(Taken::take(&self.devices)?);
        Ok(())
    }
}

struct RealControls {
    kernel: Arc<Counted<Sys>>,
    device: DeviceId,
    bdf: Bdf,
}

impl Controls for RealControls {
    fn reset(&mut self) -> anyhow::Result<()> {
        // There is such a file where the kernel knows a way.
        if !folder(self.bdf).join("reset").exists() {
            return Err(skip("the kernel knows no way to reset this device alone"));
        }
        self.kernel.inner().device(self.device).context("the device is not bound any more")?.reset();
        Ok(())
    }

    fn interrupts(&mut self) -> anyhow::Result<Box<dyn Interrupts>> {
        let handle = self.kernel.inner().device(self.device).context("the device is not bound any more")?;
        Ok(Box::new(Interrupt::enable(&handle)?))
    }
}

impl Interrupts for Interrupt {
    fn wait(&mut self, limit: Duration) -> anyhow::Result<u64> {
        Ok(Self::wait(self, limit)?)
    }
}
