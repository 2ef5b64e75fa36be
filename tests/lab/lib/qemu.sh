# shellcheck shell=bash
# The emulator and the machine it makes: an Arm server whose SMMUv3 has both stages, with PCI devices whose DMA a program can start.

# Sets $LAB_QEMU, what it can do, and $LAB_IORT_REVISION, which its IORT has.
choose_qemu() {
    local version qemu
    if [ -n "${VIOMMU_LAB_QEMU:-}" ]; then
        LAB_QEMU=$VIOMMU_LAB_QEMU
    elif qemu=$(cached qemu); then
        LAB_QEMU=$qemu/qemu
    elif LAB_QEMU=$(command -v qemu-system-aarch64); then
        say "qemu: falling back to the system's"
    else
        die "no QEMU: neither could the packages of $LAB_RELEASE-backports be had (see above)," \
            "nor is there a qemu-system-aarch64 (10.0 or newer) on PATH"
    fi
    version=$("$LAB_QEMU" --version | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p')
    case $version in
    [1-9].*) die "QEMU $version is too old: its SMMUv3 cannot nest. 10.0 or newer is needed" ;;
    10.*) LAB_IORT_REVISION=3 ;;
    *) LAB_IORT_REVISION=5 ;;
    esac
    LAB_TEST_DEVICES=(edu,dma_mask=0xffffffffffffffff edu,dma_mask=0xffffffffffffffff)
    if "$LAB_QEMU" -machine virt -device help | grep -q '"iommu-testdev"'; then
        LAB_TEST_DEVICES+=(iommu-testdev iommu-testdev)
    else
        say "qemu: $version has no iommu-testdev; steps that need it are skipped"
    fi
}

# The command line, in $LAB_MACHINE. Addresses are fixed so that a device has the same name in each run.
#
# Its time is that of its instructions, a nanosecond each, and jumps to the next timer where nobody has anything to do: a device that
# takes 100 ms costs nothing, and figures do not depend on what else the host does.
describe_machine() {
    local image=$1 archive=$2 slot=2 device
    LAB_MACHINE=(
        -M virt,iommu=smmuv3,gic-version=3 -cpu max -icount shift=0,sleep=off -m 1024 -smp 1 -global arm-smmuv3.stage=nested
        -bios "$LAB_GUEST/QEMU_EFI.fd" -kernel "$image" -initrd "$archive" -append "console=ttyAMA0 panic=-1 oops=panic log_buf_len=4M"
        -no-reboot -net none -display none -nodefaults
        -device virtio-serial-pci,id=ports,addr=1
    )
    for device in "${LAB_TEST_DEVICES[@]}"; do
        LAB_MACHINE+=(-device "$device,addr=$slot")
        slot=$((slot + 1))
    done
    for port in output results reports; do
        LAB_MACHINE+=(-chardev "file,id=$port,path=$port" -device "virtserialport,bus=ports.0,chardev=$port,name=viommu.$port")
    done
}
