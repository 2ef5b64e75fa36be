# shellcheck shell=bash
# What is expensive to make is made once, in $LAB_CACHE/NAME-KEY, where KEY is a hash over all that it is made from.

# cached RECIPE [ARGUMENT...]
# Prints the folder of the entry. When there is none yet, runs make/RECIPE in an empty folder that becomes the entry only if
# it succeeds: an interrupted run leaves nothing that a later one would trust, and of two runs at once one waits for the other.
# The key covers the recipe, its arguments and, where an argument is a file, what is in it.
cached() {
    local recipe=$1 entry
    entry=$LAB_CACHE/$recipe-$(cache_key "$@")
    if [ ! -d "$entry" ]; then
        (
            flock 9
            [ -d "$entry" ] || make_entry "$entry" "$@"
        ) 9>"$LAB_CACHE/lock/${entry##*/}" || return
    fi
    touch "$entry" # cache_prune goes by it
    printf '%s\n' "$entry"
}

cache_key() {
    local recipe=$1 argument
    shift
    {
        cat "$LAB/make/$recipe"
        printf '%s %s\n' "$LAB_ARCHITECTURE" "$LAB_CODENAME"
        for argument; do
            if [ -f "$argument" ]; then cat "$argument"; else printf '%s\n' "$argument"; fi
        done
    } | sha256sum | cut -c 1-12
}

make_entry() {
    local entry=$1 recipe=$2 began=$SECONDS making
    shift 2
    making=$(mktemp -d "$LAB_CACHE/making/$recipe.XXXXXX")
    say "$recipe: not in the cache, making it"
    if ! (cd "$making" && "$LAB/make/$recipe" "$@" >&2 9>&-); then
        rm -rf "$making"
        return 1
    fi
    chmod 755 "$making"
    mv -T "$making" "$entry"
    say "$recipe: made in $((SECONDS - began)) s, $(du -sh "$entry" | cut -f 1)"
}

# What interrupted runs left.
cache_sweep() {
    find "$LAB_CACHE/making" -mindepth 1 -maxdepth 1 -mtime +0 -exec rm -rf {} +
}

# What no run has used for 30 days.
cache_prune() {
    find "$LAB_CACHE" -mindepth 1 -maxdepth 1 -type d -name '*-*' -mtime +30 -exec rm -rf {} +
}
