//! The report for a reader: plain characters, at most [`WIDTH`] columns, the summary first.

use std::fmt::Write as _;

use comfy_table::{ColumnConstraint, Table, Width, presets};
use viommu_host_iommufd::sysfs::{Bdf, IommuKind, PciDevice, RegionKind, Seen};

use super::judge::{Answer, Verdict, Waits, Way};
use super::names::Names;
use super::obstacle::{Obstacle, Step, for_devices, listed};
use super::report::{DeviceReport, IommuReport, Offer, Report};

const WIDTH: usize = 100;
/// Where the text of a labelled line begins.
const LABEL: usize = 18;

/// `all`: tell everything of each device.
pub(super) fn render(report: &Report, names: &Names, all: bool) -> String {
    let mut page = Page::default();
    page.wrapped("", &summary(report));
    machine(&mut page, report);
    for (index, iommu) in report.iommus.iter().enumerate() {
        if report.has_devices(iommu) {
            let before = report.iommus.iter().take(index).filter(|before| report.has_devices(before));
            let twin = before.into_iter().find(|before| before.is_like(iommu));
            self::iommu(&mut page, report, iommu, twin, names);
        }
    }
    let idle = report.iommus.iter().filter(|iommu| !report.has_devices(iommu));
    let idle: Vec<_> = idle.map(|iommu| iommu.instance.name.clone()).collect();
    if !idle.is_empty() {
        page.blank();
        page.wrapped("", &format!("Nothing but bridges is behind these IOMMUs: {}.", listed(idle)));
    }
    let outside: Vec<_> =
        report.devices.iter().filter(|device| report.iommu(&device.device).is_none()).collect();
    if !outside.is_empty() {
        page.heading("Devices behind no IOMMU");
        page.text(0, &table(&outside, names, false));
    }
    if all {
        for device in &report.devices {
            self::device(&mut page, report, device, names);
        }
    }
    obstacles(&mut page, report);
    unseen(&mut page, report);
    page.text
}

fn summary(report: &Report) -> String {
    let total = report.devices.len();
    if total == 0 {
        return "There is no PCI device that could be handed over.".into();
    }
    let count = |verdict| report.count(verdict);
    let mut line = format!("{} of {total} devices can be handed over", count(Verdict::Yes));
    let rest = [
        (count(Verdict::Likely), "probably (the kernel was not asked)"),
        (count(Verdict::NotYet), "not yet (see what to do)"),
        (count(Verdict::No), "not on this machine"),
    ];
    let rest: Vec<_> =
        rest.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    if !rest.is_empty() {
        let _ = write!(line, "; {}", rest.join("; "));
    }
    line + "."
}

fn machine(page: &mut Page, report: &Report) {
    let system = &report.machine.system;
    page.heading("Machine");
    let config = match &system.config {
        Seen::Known(config) => format!("configured as in {}", config.path.display()),
        _ => "its configuration was not seen".into(),
    };
    page.field("kernel", &format!("Linux {} ({}), {config}", system.release.text, system.architecture));
    if let Some(hypervisor) = &system.hypervisor {
        page.field("virtual machine", hypervisor);
    }
    page.field(
        "iommufd",
        match (system.iommufd.exists, system.iommufd.usable) {
            (false, _) => "no /dev/iommu",
            (true, false) => "/dev/iommu, which this user may not open",
            (true, true) => "/dev/iommu, ready",
        },
    );
    page.field(
        "VFIO",
        match (system.vfio_drivers.as_slice(), system.vfio_pci) {
            ([], _) => "driver vfio-pci is not loaded",
            (_, true) => "driver vfio-pci is loaded",
            (_, false) => "a variant of vfio-pci is loaded",
        },
    );
    page.field("firmware", &firmware(report));
    let words = report.parameters().unwrap_or_default();
    if !words.is_empty() {
        page.field("command line", &words.join(" "));
    }
}

fn firmware(report: &Report) -> String {
    let firmware = &report.machine.system.firmware;
    if firmware.acpi.known().is_none() {
        return if firmware.device_tree { "device tree" } else { "neither ACPI nor a device tree was seen" }
            .into();
    }
    let tables = [("DMAR", "VT-d"), ("IVRS", "AMD"), ("RIMT", "RISC-V"), ("VIOT", "virtio-iommu")];
    if let Some((name, kind)) = tables.into_iter().find(|(name, _)| firmware.has_table(name)) {
        return format!("ACPI, table {name} ({kind})");
    }
    match &firmware.iort {
        Seen::Known(iort) => {
            let canwbs = iort.root_complexes.iter().filter(|complex| complex.canwbs).count();
            format!(
                "ACPI, table IORT: SMMUv3: {}; PCI root complexes: {}, with CANWBS: {canwbs}",
                iort.smmuv3.len(),
                iort.root_complexes.len()
            )
        }
        Seen::Hidden { .. } => "ACPI, table IORT, which this user may not read".into(),
        Seen::Absent => "ACPI, without a table of IOMMUs".into(),
    }
}

/// `twin`: one that was told before, and is the same.
fn iommu(page: &mut Page, report: &Report, iommu: &IommuReport, twin: Option<&IommuReport>, names: &Names) {
    let instance = &iommu.instance;
    page.heading(&format!("IOMMU {}: {}", instance.name, kind_name(instance.kind)));
    match twin {
        Some(twin) => page.field("like", &twin.instance.name),
        None => abilities(page, iommu),
    }
    if !iommu.platform_devices.is_empty() {
        let text = format!("{} on other buses than PCI, not judged here", iommu.platform_devices.len());
        page.field("other devices", &text);
    }
    let behind: Vec<_> = report
        .devices
        .iter()
        .filter(|device| device.device.iommu.as_deref() == Some(&instance.name))
        .collect();
    page.blank();
    page.text(0, &table(&behind, names, true));
}

fn abilities(page: &mut Page, iommu: &IommuReport) {
    page.field(
        "hands over",
        match iommu.way {
            Some(Way::PasidTable) => {
                "the guest's PASID table (context descriptors), natively; page tables one by one, mediated"
            }
            Some(Way::PageTables) => {
                "the guest's page tables, one for each PASID, natively; its PASID table, mediated"
            }
            None => "nothing; MAP and UNMAP requests need no handover",
        },
    );
    match &iommu.capabilities {
        Some(capabilities) => {
            for (label, text) in capabilities.lines() {
                page.field(label, &text);
            }
        }
        None if iommu.way.is_some() => page.field("capabilities", "not told yet (see the end)"),
        None => {}
    }
    for note in &iommu.notes {
        page.field("note", note);
    }
}

fn kind_name(kind: IommuKind) -> &'static str {
    match kind {
        IommuKind::Smmuv3 => "Arm SMMUv3",
        IommuKind::Smmuv2 => "Arm SMMU, version 1 or 2",
        IommuKind::Vtd(_) => "Intel VT-d",
        IommuKind::Amd(_) => "AMD IOMMU",
        IommuKind::Riscv => "RISC-V IOMMU",
        IommuKind::Virtio => "virtio-iommu",
        IommuKind::Other => "of a kind that is not known here",
    }
}

/// One line for each device.
fn table(devices: &[&DeviceReport], names: &Names, judged: bool) -> String {
    const NAME: u16 = 32;
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let mut header = vec![" device", "what", "group", "driver", "PASID", "ATS", "PRI"];
    header.extend(judged.then_some("handover"));
    table.set_header(header);
    for report in devices {
        let device = &report.device;
        let config = device.config.known().filter(|config| config.is_whole());
        let flag = |has: bool| if has { "yes" } else { "-" }.to_owned();
        let seen = |text: Option<String>| text.unwrap_or_else(|| "?".to_owned());
        let mut row = vec![
            format!(" {}", device.bdf),
            shortened(&names.of(device), usize::from(NAME)),
            device.group.map_or_else(|| "-".to_owned(), |group| group.to_string()),
            shortened(device.driver.as_deref().unwrap_or("-"), 14),
            seen(config.map(|config| config.pasid().map_or("-".to_owned(), |pasid| pasid.bits.to_string()))),
            seen(config.map(|config| flag(config.ats().is_some()))),
            seen(config.map(|config| flag(config.page_requests()))),
        ];
        row.extend(judged.then(|| verdict(report.verdict).to_owned()));
        table.add_row(row);
    }
    if let Some(column) = table.column_mut(1) {
        column.set_constraint(ColumnConstraint::UpperBoundary(Width::Fixed(NAME + 2)));
    }
    let lines: Vec<_> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n")
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Yes => "yes",
        Verdict::Likely => "likely",
        Verdict::NotYet => "not yet",
        Verdict::No => "no",
    }
}

/// All about one device.
fn device(page: &mut Page, report: &Report, each: &DeviceReport, names: &Names) {
    let device = &each.device;
    page.heading(&format!("Device {}: {}", device.bdf, names.of(device)));
    let (vendor, id, class) = (device.vendor, device.device, device.class);
    page.field("identity", &format!("vendor {vendor:04x}, device {id:04x}, class {class:06x}"));
    page.field("handover", verdict(each.verdict));
    if let Some(Offer { way, waits }) = &each.offer {
        let [pasid_table, page_table] = way.kinds();
        page.field("offered", &format!("PASID table: {pasid_table}; page table by PASID: {page_table}"));
        let answer = match waits {
            Waits::Likely => "likely",
            Waits::No(_) => "no",
            Waits::Unseen(_) => "not known",
        };
        page.field("page requests", &format!("{answer}: {}", waits.reason()));
    }
    page.field("driver", device.driver.as_deref().unwrap_or("none"));
    if let Some(vfio) = &device.vfio {
        let file = vfio.node.as_ref().map_or("no file".to_owned(), |node| node.path.display().to_string());
        page.field("VFIO device", &format!("{} ({file})", vfio.name));
    }
    page.field("IOMMU", device.iommu.as_deref().unwrap_or("none"));
    if let Some(group) = device.group.and_then(|id| report.machine.group(id)) {
        let domain = group.domain.as_deref().unwrap_or("not told");
        page.field("group", &format!("{}, the host's own translation: {domain}", group.id));
        let others: Vec<_> =
            group.devices.iter().filter(|name| **name != device.bdf.to_string()).cloned().collect();
        if !others.is_empty() {
            page.field("in the group", &listed(others));
        }
        for region in &group.regions {
            let kind = match region.kind {
                RegionKind::Direct => "mapped 1:1 at all times",
                RegionKind::DirectRelaxable => "mapped 1:1 until it is handed over",
                RegionKind::Reserved => "never translated",
                RegionKind::Msi => "interrupts (MSI)",
                RegionKind::Other => "of a kind that is not known here",
            };
            page.field(
                "reserved",
                &format!("{:#x}..={:#x} {kind}", region.range.start().0, region.range.last().0),
            );
        }
    }
    if let Some(node) = device.numa_node {
        page.field("NUMA node", &node.to_string());
    }
    page.field("PCI", &capabilities(device));
    match &each.answer {
        Answer::Examined(examined) => {
            let asked = [
                ("registers", examined.hw_info.map(|info| info.map(drop))),
                ("nest parent", examined.nest_parent),
                ("vIOMMU", examined.viommu),
                ("fault events", examined.events),
                ("guest's table", examined.nested),
            ];
            let told: Vec<_> = asked
                .into_iter()
                .filter_map(|(what, answer)| {
                    Some(match answer? {
                        Ok(()) => format!("{what} ok"),
                        Err(errno) => format!("{what} {errno:?}"),
                    })
                })
                .collect();
            page.field("kernel says", &told.join(", "));
        }
        Answer::NotGiven(why) => page.field("kernel says", why),
        Answer::NotAsked { .. } => page.field("kernel says", "(not asked)"),
    }
    for note in &each.notes {
        page.field("note", note);
    }
}

fn capabilities(device: &PciDevice) -> String {
    let Some(config) = device.config.known().filter(|config| config.is_whole()) else {
        return "capabilities not seen (run this as root)".into();
    };
    let state = |enabled: bool| if enabled { "on" } else { "off" };
    let mut parts = Vec::new();
    match config.pasid() {
        Some(pasid) => parts.push(format!("PASIDs of {} bits ({})", pasid.bits, state(pasid.enabled))),
        None => parts.push("no PASIDs".into()),
    }
    match config.ats() {
        Some(ats) => parts.push(format!("ATS ({})", state(ats.enabled))),
        None => parts.push("no ATS".into()),
    }
    parts.push(if config.page_requests() { "page requests" } else { "no page requests" }.into());
    if let Some(sriov) = config.sriov() {
        parts.push(format!("SR-IOV: {} of {} virtual functions", sriov.enabled, sriov.total));
    }
    parts.join(", ")
}

/// Everything that stands in the way, once, with the devices that it concerns.
fn obstacles(page: &mut Page, report: &Report) {
    let all: Vec<Bdf> = report.devices.iter().map(|device| device.device.bdf).collect();
    let mut found: Vec<(&Obstacle, Option<String>, Vec<Bdf>)> = Vec::new();
    found.extend(report.obstacles.iter().map(|obstacle| (obstacle, None, all.clone())));
    for iommu in report.iommus.iter().filter(|iommu| report.has_devices(iommu)) {
        let name = &iommu.instance.name;
        for obstacle in &iommu.obstacles {
            match found.iter_mut().find(|(other, whose, _)| *other == obstacle && whose.is_some()) {
                Some((_, Some(whose), _)) => {
                    let _ = write!(whose, ", {name}");
                }
                _ => found.push((obstacle, Some(format!("IOMMU {name}")), Vec::new())),
            }
        }
    }
    let machine_wide = found.len();
    for device in &report.devices {
        // Steps for a device that can never be handed over only mislead.
        if device.verdict == Verdict::No {
            continue;
        }
        for obstacle in &device.obstacles {
            let known = found.iter().skip(machine_wide).position(|(other, ..)| *other == obstacle);
            match known.and_then(|place| found.get_mut(machine_wide + place)) {
                Some((_, _, devices)) => devices.push(device.device.bdf),
                None => found.push((obstacle, None, vec![device.device.bdf])),
            }
        }
    }
    if found.is_empty() {
        return;
    }
    page.heading("What stands in the way, and what to do");
    for (number, (obstacle, whose, devices)) in found.iter().enumerate() {
        let whose = match whose {
            Some(name) => format!("IOMMU {name}"),
            None if number < report.obstacles.len() => "the whole machine".to_owned(),
            None => named(devices),
        };
        page.wrapped(&format!("  {}. ", number + 1), &format!("{} ({whose})", capital(obstacle.short())));
        page.wrapped("     ", &obstacle.to_string());
        let steps = obstacle.steps();
        if steps.is_empty() {
            page.wrapped("     ", "Nothing can be done about it here.");
        }
        for step in steps {
            match step {
                Step::Do(text) => page.wrapped("     -> ", &text),
                Step::Run(commands) => {
                    page.wrapped("     -> ", "As root:");
                    for command in for_devices(&commands, devices) {
                        page.line(&format!("          {command}"));
                    }
                }
            }
        }
        page.blank();
    }
}

fn named(devices: &[Bdf]) -> String {
    const MOST: usize = 4;
    if devices.len() <= MOST {
        return listed(devices.iter().map(Bdf::to_string));
    }
    let shown: Vec<_> = devices.iter().take(MOST - 1).map(Bdf::to_string).collect();
    format!("{} and {} more", shown.join(", "), devices.len() - shown.len())
}

fn unseen(page: &mut Page, report: &Report) {
    if report.unseen.is_empty() {
        return;
    }
    page.heading("What could not be seen");
    for unseen in &report.unseen {
        page.wrapped("  - ", &format!("{}: {}. To see it, {}.", unseen.what, unseen.why, unseen.how));
    }
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let kept: String = text.chars().take(most.saturating_sub(2)).collect();
    format!("{}..", kept.trim_end())
}

/// Lines of text.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn line(&mut self, line: &str) {
        self.text.push_str(line.trim_end());
        self.text.push('\n');
    }

    fn blank(&mut self) {
        if !self.text.ends_with("\n\n") {
            self.text.push('\n');
        }
    }

    fn heading(&mut self, text: &str) {
        self.blank();
        self.line(text);
    }

    fn text(&mut self, indent: usize, text: &str) {
        for line in text.lines() {
            self.line(&format!("{:indent$}{line}", ""));
        }
    }

    fn field(&mut self, label: &str, text: &str) {
        self.wrapped(&format!("  {label:LABEL$}"), text);
    }

    /// `text` after `first`, further lines below its beginning.
    fn wrapped(&mut self, first: &str, text: &str) {
        let indent = first.chars().count();
        let mut line = first.to_owned();
        let mut empty = true;
        for word in text.split_whitespace() {
            if !empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
                self.line(&line);
                line = " ".repeat(indent);
                empty = true;
            }
            if !empty {
                line.push(' ');
            }
            line.push_str(word);
            empty = false;
        }
        self.line(&line);
    }
}
