# shellcheck shell=bash
# The kernel: the prebuilt one when it is what we would build ourselves, else ours.

LAB_KERNEL_SOURCE=linux-source-7.3

# Prints the path of the Image.
kernel_image() {
    local fragment=$LAB/config/arm64.fragment tools kernel
    if prebuilt_matches "$fragment"; then
        printf '%s\n' "$LAB_PREBUILT"/Image-arm64-*
        return
    fi
    cross_compiler
    tools=$(cached kernel-tools)
    kernel=$(LAB_KERNEL_TOOLS=$tools cached kernel "$LAB_KERNEL_SOURCE" "$fragment")
    printf '%s\n' "$kernel/Image"
}

# Made from our configuration, and unharmed.
prebuilt_matches() {
    local fragment=$1
    [ -d "$LAB_PREBUILT" ] || return 1
    if ! cmp -s "$LAB_PREBUILT/config-arm64.fragment" "$fragment"; then
        say "kernel: $LAB_PREBUILT was made from another configuration than config/arm64.fragment, not used"
        return 1
    fi
    if ! (cd "$LAB_PREBUILT" && grep -e ' Image-arm64-' -e ' iort-' SHA256SUMS | sha256sum --check --quiet --strict) >&2; then
        say "kernel: $LAB_PREBUILT does not match its SHA256SUMS, not used"
        return 1
    fi
}
