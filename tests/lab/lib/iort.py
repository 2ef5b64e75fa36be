"""Writes the ACPI table IORT of QEMU's machine `virt`, with one flag added.

    iort.py REVISION >iort.aml        (REVISION: 3 for QEMU 10, 5 for QEMU 11)

The kernel gives a guest its own stage-1 tables only below an IOMMU that keeps a device's accesses coherent whatever the guest's tables
say. QEMU's SMMUv3 has no S2FWB, so it has to come from the root complex: CANWBS, bit 2 of its memory access flags, which QEMU leaves
clear. The kernel takes this table from the head of the initramfs instead of the machine's, because its OEM revision is higher.

Layout: Arm DEN0049, "IO Remapping Table".
"""

import struct
import sys

ITS_GROUP, ROOT_COMPLEX, SMMUV3 = 0, 2, 4
CPM, DACS, CANWBS = 1, 2, 4
HEADER_BYTES, NODE_HEADER_BYTES, MAPPING_BYTES = 48, 16, 20


def node(kind, revision, identifier, body, mappings=()):
    """`mappings`: (first input ID, last input ID, offset of the node they go to); IDs are kept."""
    mappings_at = NODE_HEADER_BYTES + len(body)
    length = mappings_at + MAPPING_BYTES * len(mappings)
    head = struct.pack(
        "<BHBIII", kind, length, revision, identifier, len(mappings), mappings_at if mappings else 0
    )
    tail = b"".join(struct.pack("<IIIII", first, last - first, first, to, 0) for first, last, to in mappings)
    return head + body + tail


def iort(revision):
    its_at = HEADER_BYTES
    its = node(ITS_GROUP, 1, 0, struct.pack("<II", 1, 0))

    smmu_at = its_at + len(its)
    base, coherent, event_irq, pri_irq, error_irq, sync_irq = 0x0905_0000, 1, 106, 107, 109, 108
    smmu = node(
        SMMUV3,
        4,
        1 if revision == 3 else 0,
        struct.pack("<QIIQIIIIIII", base, coherent, 0, 0, 0, event_irq, pri_irq, error_irq, sync_irq, 0, 0),
        [(0, 0xFFFF, its_at)],
    )

    complex_at = smmu_at + len(smmu)
    coherent_device, address_bits = 1, 64
    root_complex = node(
        ROOT_COMPLEX,
        3,
        2,
        struct.pack("<IBHBIIB3x", coherent_device, 0, 0, CPM | DACS | CANWBS, 0, 0, address_bits),
        [(0, 0xFF, smmu_at), (0x100, 0xFFFF, its_at)],
    )

    length = complex_at + len(root_complex)
    table = bytearray(
        struct.pack("<4sIBB6s8sI4sI", b"IORT", length, revision, 0, b"BOCHS ", b"BXPC    ", 2, b"BXPC", 1)
        + struct.pack("<III", 3, HEADER_BYTES, 0)
        + its
        + smmu
        + root_complex
    )
    table[9] = -sum(table) & 0xFF
    return bytes(table)


if __name__ == "__main__":
    sys.stdout.buffer.write(iort(int(sys.argv[1])))
