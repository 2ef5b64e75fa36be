# shellcheck shell=bash
# What the machine's memory holds at the start.

# initramfs ARCHIVE PROGRAMS PLAN: PROGRAMS is a folder that becomes /bin, PLAN the file with the steps.
initramfs() {
    local archive=$1 programs=$2 plan=$3 iort=$LAB_RUN/iort.aml
    python3 "$LAB/lib/iort.py" "$LAB_IORT_REVISION" >"$iort"
    {
        # First, where the kernel looks before it unpacks anything.
        printf 'kernel/firmware/acpi/iort.aml\t%s\n' "$iort"
        printf 'init\t%s\n' "$LAB/init"
        printf 'bin/busybox\t%s\n' "$LAB_GUEST/busybox"
        printf 'bin\t%s\n' "$programs"
        printf 'lab/plan\t%s\n' "$plan"
        if [ -n "$LAB_SHELL" ]; then
            printf 'lab/shell\t/dev/null\n'
        fi
        printf 'lab/captures\t%s\n' "$LAB_ROOT/tests/captures"
        # At the path it has on the host, for test programs that were compiled with it.
        printf '%s\t%s\n' "${LAB_ROOT#/}/tests/captures" "$LAB_ROOT/tests/captures"
    } | python3 "$LAB/lib/cpio.py" "$archive"
}
