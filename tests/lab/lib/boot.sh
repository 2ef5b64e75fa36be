# shellcheck shell=bash
# Runs the machine, and judges what it did.

# Everything it writes lands in the current folder: console, output, results, reports.
boot() {
    local limit=$1 follower status=0
    : >output
    : >results
    timeout --kill-after=5 "$limit" "$LAB_QEMU" "${LAB_MACHINE[@]}" -monitor none \
        -chardev file,id=console,path=console -serial chardev:console </dev/null 2>qemu.log &
    LAB_EMULATOR=$! # leave() ends it if this run is interrupted, its time limit if this run is killed
    tail -n +1 -f --pid="$LAB_EMULATOR" output &
    follower=$!
    wait "$LAB_EMULATOR" || status=$?
    LAB_EMULATOR=
    wait "$follower" || true
    if [ "$status" = 124 ]; then
        complain "the machine was not done within $limit s"
    elif [ "$status" != 0 ]; then
        complain "QEMU ended with status $status: $(cat qemu.log)"
    fi
}

LAB_KERNEL_COMPLAINTS='Kernel panic|Oops|BUG: |\[ cut here \]'

LAB_COMPLAINTS=0
complain() {
    LAB_COMPLAINTS=$((LAB_COMPLAINTS + 1))
    printf 'lab: FAILED: %s\n' "$*" >&2
}

# How long the machine may take for all steps of a plan, and to start.
plan_seconds() {
    awk '!/^ *(#|$)/ { sum += $2 } END { print sum + 60 }' "$1"
}

# One line per step of the plan, then whatever else went wrong.
judge() {
    local plan=$1 reports=$2 name rest verdict took why log
    printf '\n'
    while read -r name rest; do
        case $name in
        '' | '#'*) continue ;;
        esac
        verdict=missing took='' why=''
        read -r _ verdict took why < <(grep "^$name " results) || true
        printf '%-8s %-20s %6s ms  %s\n' "${verdict:-missing}" "$name" "${took:--}" "$why"
        case $verdict in
        passed | skipped) ;;
        *) complain "step $name: $verdict $why" ;;
        esac
    done <"$plan"
    if [ "$(tail -n 1 results)" != end ]; then
        complain "the machine did not come to the end of the plan; the last its kernel said:"
        tail -n 25 console >&2
    fi
    log=console # up to where it got, if it got no further
    if [ -s "$reports/dmesg.txt" ]; then
        log=$reports/dmesg.txt
    fi
    if grep -E -q "$LAB_KERNEL_COMPLAINTS" "$log"; then
        complain "the kernel complained:"
        grep -E -A 12 "$LAB_KERNEL_COMPLAINTS" "$log" | head -n 60 >&2
    fi
}
