# shellcheck shell=bash
# One line of progress per thing that takes time, with the seconds since the start of the run.

say() {
    printf 'lab %4d s  %s\n' "$SECONDS" "$*" >&2
}

die() {
    printf 'lab: %s\n' "$*" >&2
    exit 1
}

# Runs a command that says much; its words are shown only when it fails.
quietly() {
    local words status=0
    words=$(mktemp "$LAB_RUN/words.XXXXXX")
    "$@" >"$words" 2>&1 </dev/null || status=$?
    if [ "$status" != 0 ]; then
        tail -n 60 "$words" >&2
        say "failed with status $status: $*"
    fi
    rm -f "$words"
    return "$status"
}
