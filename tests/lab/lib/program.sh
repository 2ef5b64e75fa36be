# shellcheck shell=bash
# Our programs, built for the machine: `viommu`, the test targets of the package viommu-tests whose names start with `lab_`, and
# the tests in viommu-host-iommufd.

# Leaves them in the folder $1, each under the name of its target.
build_programs() {
    local into=$1 targets=(--package viommu --bin viommu) test
    for test in "$LAB_ROOT"/tests/tests/lab_*.rs "$LAB_ROOT"/tests/tests/lab_*/main.rs; do
        if [ -e "$test" ]; then
            test=${test%/main.rs}
            test=${test##*/}
            targets+=(--package viommu-tests --test "${test%.rs}")
        fi
    done
    (
        # The programs in the target folder are whose build came last.
        flock 9
        cd "$LAB_ROOT"
        options=(--locked --release --quiet "${LAB_CARGO_FLAGS[@]}" --message-format=json-render-diagnostics)
        cargo build "${options[@]}" "${targets[@]}" 9>&- >"$LAB_RUN/cargo.json"
        cargo test --no-run "${options[@]}" --package viommu-host-iommufd --lib 9>&- >>"$LAB_RUN/cargo.json"
        python3 "$LAB/lib/executables.py" <"$LAB_RUN/cargo.json" | while IFS=$'\t' read -r name path; do
            cp "$path" "$into/$name"
        done
    ) 9>"$LAB_CACHE/lock/target"
}
