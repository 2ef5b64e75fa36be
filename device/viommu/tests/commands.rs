//! Each command of the console, and what is no command.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod program;

use program::*;

#[test]
fn features_are_negotiated() {
    // INPUT_RANGE, DOMAIN_RANGE, MAP_UNMAP, PROBE, MMIO, BYPASS_CONFIG, ATTACH_TABLE, INDIRECT_DESC, EVENT_IDX, VERSION_1.
    converse(
        &[],
        &[
            ("features", "features 0x1300000f7"),
            ("accept 0x1300000f7", "ok"),
            ("accept 4", "ok"),
            // BYPASS, bit 3, is not offered; nor is bit 40.
            ("accept 8", "error bits 0x8 were not offered"),
            ("accept 0x10000000000", "error bits 0x10000000000 were not offered"),
            ("accept ffffffffffffffffff", "error*"),
            ("accept", "error usage: accept HEX"),
            ("accept xyz", "error*"),
            ("features", "features 0x1300000f7"),
        ],
    );
}

#[test]
fn a_refused_accept_changes_nothing_and_a_good_one_resets() {
    converse(
        &[],
        &[
            (attach(1, 8), status(OK)),
            (map(1, 0x1000, 0x1fff, 0xa000, 3), status(OK)),
            ("accept 8".into(), "error*".into()),
            ("dma 8 - 0x1000 1 r".into(), "ok 0xa000".into()),
            ("accept 4".into(), "ok".into()),
            ("dma 8 - 0x1000 1 r".into(), "fault unattached".into()),
            // PROBE, BYPASS_CONFIG and ATTACH_TABLE are not negotiated.
            (attach_smmuv3(1, 8, 0, 0), "used 0 00000000".into()),
            (attach_bypass(1, 8), status(INVAL)),
            ("config-write 36 01".into(), "error BYPASS_CONFIG was not negotiated".into()),
            ("reset".into(), "ok".into()),
            // The same set again.
            ("config-write 36 01".into(), "error BYPASS_CONFIG was not negotiated".into()),
            (attach(1, 8), status(OK)),
        ],
    );
}

#[test]
fn without_event_idx_and_indirect_descriptors_the_queues_work_too() {
    converse(
        &[],
        &[
            ("accept 0x1000000f7".to_owned(), "ok".to_owned()),
            (attach(1, 8), status(OK)),
            ("dma 8 - 0 1 r".into(), "fault unmapped".into()),
            ("event 24".into(), format!("used 24 02000000{}{}{}{}", le32(0x101), le32(8), zeros(4), le64(0))),
        ],
    );
}

#[test]
fn the_configuration_space_is_read_and_written() {
    let space = format!(
        "{}{}{}{}{}{}{}",
        le64(0xffff_ffff_ffff_f000),
        le64(0),
        le64((1 << 48) - 1),
        le32(0),
        le32(u32::MAX),
        le32(512),
        zeros(4)
    );
    converse(
        &[],
        &[
            ("config 0 40", format!("config {space}").as_str()),
            ("config 36 1", "config 00"),
            ("config 0x24 4", "config 00000000"),
            ("config 1 2", "config f0ff"),
            ("config 38 4", "config 00000000"),
            ("config 4294967295 4", "config 00000000"),
            ("config 4294967296 4", "error*"),
            ("config 0 0", "error*"),
            ("config 0 4097", "error*"),
            ("config 0", "error usage: config OFFSET N"),
            ("config-write 36 01", "ok"),
            ("config 36 1", "config 01"),
            ("dma 8 - 0x1234 1 w", "ok 0x1234"),
            ("config-write 36 02", "error bypass cannot be 2"),
            ("config-write 36 0100", "error*"),
            ("config-write 0 00", "error*"),
            ("config-write 36", "error usage: config-write OFFSET HEX"),
            ("config-write 36 1", "error*"),
            // A device reset keeps it (D-6).
            ("reset", "ok"),
            ("config 36 1", "config 01"),
            ("config-write 36 00", "ok"),
            ("dma 8 - 0x1234 1 w", "fault unattached"),
        ],
    );
}

#[test]
fn guest_memory_is_written_and_read() {
    converse(
        &[],
        &[
            ("peek 0x40000000 4", "00000000"),
            ("mem 0x40000001 0aFf", "ok"),
            ("peek 0x40000000 4", "000aff00"),
            ("peek 1073741825 1", "0a"),
            ("mem 0x4fffffff 01", "ok"),
            ("peek 0x4fffffff 1", "01"),
            ("mem 0x4fffffff 0203", "error*"),
            ("peek 0x4fffffff 1", "01"),
            ("peek 0x4fffffff 2", "error*"),
            ("mem 0x3fffffff 0203", "error*"),
            ("peek 0x40000000 1", "00"),
            ("peek 0x50000000 1", "error*"),
            ("peek 0xffffffffffffffff 1", "error*"),
            ("peek 0xffffffffffffffff 2", "error*"),
            ("peek 0x100000000000000 1", "error*"),
            ("mem 0x100000000000000 00", "error*"),
            ("peek 0x40000000 0", "error*"),
            ("peek 0x40000000 65537", "error*"),
            ("mem 0x40000000 0", "error HEX: byte string has an odd number of digits"),
            ("mem 0x40000000 0x00", "error HEX: `x` is not a hexadecimal digit"),
            ("mem 0x40000000", "error usage: mem GPA HEX"),
            ("peek 0x40000000", "error usage: peek GPA N"),
        ],
    );
    let answers = answers(&[], b"peek 0x40000000 65536\n");
    assert_eq!(answers, [zeros(65536)]);
}

#[test]
fn dma_answers_pieces_or_a_reason() {
    converse(
        &[],
        &[
            ("dma 8 - 0x1000 1 r".to_owned(), "fault unattached".to_owned()),
            ("dma 7 - 0x1000 1 r".into(), "error there is no endpoint 7".into()),
            (attach(1, 8), status(OK)),
            (map(1, 0x1000, 0x1fff, 0xa000, 3), status(OK)),
            (map(1, 0x2000, 0x2fff, 0xb000, 3), status(OK)),
            (map(1, 0x3000, 0x3fff, 0xf000, 1), status(OK)),
            ("dma 8 - 0x1000 0x3000 r".into(), "ok 0xa000 0xf000".into()),
            ("dma 8 - 0x2ffe 4 r".into(), "ok 0xbffe 0xf000".into()),
            ("dma 8 - 0x2ffe 4 w".into(), "fault permission".into()),
            ("dma 8 - 0x3fff 2 r".into(), "fault unmapped".into()),
            ("dma 8 - 0xfff 2 r".into(), "fault unmapped".into()),
            ("dma 8 - 0x3fff 1 r".into(), "ok 0xffff".into()),
            // The MSI window: writes pass, nothing else does.
            ("dma 8 - 0x8000040 4 w".into(), "ok 0x8000040".into()),
            ("dma 8 - 0x8000040 4 r".into(), "fault unmapped".into()),
            // The domain has mappings for untagged accesses only.
            ("dma 8 5 0x1000 1 r".into(), "fault unattached".into()),
            ("dma 8 - 0x1000 0 r".into(), "error*".into()),
            ("dma 8 - 0x1000 16777217 r".into(), "error*".into()),
            ("dma 8 - 0xffffffffffffffff 2 r".into(), "error the access wraps at 2^64".into()),
            ("dma 8 - 0xffffffffffffffff 1 r".into(), "fault unmapped".into()),
            ("dma 8 1048576 0 1 r".into(), "error PASID 1048576 has more than 20 bits".into()),
            ("dma 8 - 0 1 x".into(), "error `x` is neither r nor w".into()),
            ("dma 8 - 0 1".into(), "error usage: dma ENDPOINT PASID|- IOVA N r|w [wait]".into()),
            ("dma 4294967296 - 0 1 r".into(), "error*".into()),
            ("dma -1 - 0 1 r".into(), "error*".into()),
        ],
    );
}

#[test]
fn page_requests_are_offered_where_an_endpoint_may_wait() {
    converse(
        &["--page-requests", "8"],
        &[
            // PAGE_REQUEST is bit 56.
            ("features".to_owned(), "features 0x1000001300000f7".to_owned()),
            // What this endpoint cannot do by a page of the guest's is a fault as ever.
            ("dma 8 - 0x1000 4 r wait".into(), "fault unattached".into()),
            ("dma 7 - 0x1000 4 r wait".into(), "error there is no endpoint 7".into()),
            (attach(1, 8), status(OK)),
            (map(1, 0x1000, 0x1fff, 0xa000, 3), status(OK)),
            ("dma 8 - 0x1000 4 r wait".into(), "ok 0xa000".into()),
            ("dma 8 - 0x2000 4 r wait".into(), "fault unmapped".into()),
            ("dma 8 - 0x2000 4 r later".into(), "error usage: dma *".into()),
            ("waiting".into(), "none".into()),
            ("again 1".into(), "error no access 1 has waited".into()),
            ("again 0".into(), "error no access 0 has waited".into()),
            ("respond 8 - 0 success".into(), status(NOENT)),
            ("respond 7 5 0 success".into(), status(NOENT)),
            ("respond 8 5 0 maybe".into(), "error `maybe` is none of success, invalid, failure".into()),
            ("time 18446744073709551615".into(), "due never".into()),
        ],
    );
    converse(&["--page-requests", "8", "--features", "f7"], &[("features", "features 0x1300000f7")]);
    converse(&["--features", "1000000000000f7"], &[("features", "features 0x1300000f7")]);
    refused(&["--page-requests", "7"], "there is no endpoint 7");
    refused(&["--features", "2000000000000f7"], "the device does not have bits 0x200000000000000");
}

#[test]
fn faults_wait_as_events_until_a_buffer_holds_them() {
    let record = |reason: u8, flags: u32, address: u64| {
        format!("{reason:02x}000000{}{}{}{}", le32(flags), le32(8), zeros(4), le64(address))
    };
    converse(
        &[],
        &[
            ("event 24".to_owned(), "none".to_owned()),
            ("dma 8 - 0x5000 8 r".into(), "fault unattached".into()),
            (attach(1, 8), status(OK)),
            (map(1, 0x1000, 0x1fff, 0xa000, 1), status(OK)),
            ("dma 8 - 0x1ff8 8 w".into(), "fault permission".into()),
            ("event 0".into(), "used 0".into()),
            ("event 1".into(), "used 0 00".into()),
            ("event 23".into(), format!("used 0 {}", zeros(23))),
            ("event 24".into(), format!("used 24 {}", record(1, 0x101, 0x5000))),
            ("event 32".into(), format!("used 24 {}{}", record(2, 0x102, 0x1ff8), zeros(8))),
            ("event 24".into(), "none".into()),
            ("event 4096".into(), "none".into()),
            ("event 4097".into(), "error*".into()),
            ("event".into(), "error usage: event N".into()),
            ("dma 8 - 0x9000 1 r".into(), "fault unmapped".into()),
            ("event 4096".into(), format!("used 24 {}{}", record(2, 0x101, 0x9000), zeros(4096 - 24))),
            ("dma 8 - 0x9000 1 r".into(), "fault unmapped".into()),
            ("reset".into(), "ok".into()),
            ("event 24".into(), "none".into()),
        ],
    );
}

#[test]
fn requests_may_be_cut_anywhere() {
    let whole = map_bytes(1, 0x1000, 0x1fff, 0xa000, 3);
    let singles: Vec<&str> =
        whole.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap()).collect();
    let mut exchanges = vec![(attach(1, 8), status(OK))];
    for cut in 1..whole.len() / 2 {
        let (first, second) = whole.split_at(2 * cut);
        exchanges.push((format!("req {first},{second} 1,3"), status(OK)));
        exchanges.push((unmap(1, 0, 0xffff), status(OK)));
    }
    exchanges.push((format!("req {} 1,1,1,1", singles.join(",")), status(OK)));
    exchanges.push(("dma 8 - 0x1abc 4 w".into(), "ok 0xaabc".into()));
    converse(&[], &exchanges);
}

#[test]
fn odd_chains_come_back_unwritten_and_the_queue_goes_on() {
    converse(
        &[],
        &[
            (attach(1, 8), status(OK)),
            // Descriptors of length 0.
            ("req 01000000,, 4".into(), "used 0 00000000".into()),
            ("req 01000000 0,4".into(), "used 0 00000000".into()),
            ("req 01000000 4,-".into(), "used 0 00000000".into()),
            // No readable part, no writable part, no head, no tail.
            ("req - 4".into(), "used 0 00000000".into()),
            ("req 0100 4".into(), "used 0 00000000".into()),
            ("req 01000000 0".into(), "used 0".into()),
            ("req 01000000 -".into(), "used 0".into()),
            ("req 01000000 3".into(), "used 0 000000".into()),
            ("req 01000000 1,2".into(), "used 0 000000".into()),
            // As many descriptors as the queue has, and more.
            (format!("req {}00 1,1,1,1", "00,".repeat(1019)), "used 0 00000000".into()),
            (format!("req {}00 1,1,1,1", "00,".repeat(1020)), "error a request has at most*".into()),
            ("req - -".into(), "error a request has at least one part".into()),
            (format!("req 01000000 {}", 1 << 20), "used 4 04000000*".into()),
            (format!("req 01000000 {}", (1 << 20) + 1), "error*".into()),
            (format!("req {} 4", zeros((1 << 20) + 1)), "error*".into()),
            (detach(1, 8), status(OK)),
        ],
    );
}

#[test]
fn what_is_no_command_is_an_error_and_the_console_goes_on() {
    converse(
        &[],
        &[
            ("frobnicate", "error unknown command `frobnicate`; help names them all"),
            ("FEATURES", "error unknown command*"),
            ("req", "error usage: req*"),
            ("req 00", "error usage: req*"),
            ("req 00 4 4", "error usage: req*"),
            ("req 0 4", "error HEX: byte string has an odd number of digits"),
            ("req 0g 4", "error HEX: `g` is not a hexadecimal digit"),
            ("req 00 four", "error W: `four` is not a number*"),
            ("req 00 +4", "error W: `+4` is not a number*"),
            ("req 00 99999999999999999999", "error W:*"),
            ("features now", "error usage: features"),
            ("reset now", "error usage: reset"),
            ("bind 8", "error bind needs --capture"),
            ("help", "req HEX*"),
            ("features", "features 0x*"),
        ],
    );
}

#[test]
fn only_commands_are_answered() {
    let lines = b"\n   \n# features\n#\n\t\r\nfeatures\r\n  features  \nfeatures";
    assert_eq!(answers(&[], lines), ["features 0x1300000f7"; 3]);
    assert!(answers(&[], b"").is_empty());
}

#[test]
fn lines_that_are_no_text_or_too_long_are_errors() {
    let mut lines = b"\xff\xfe\nfeatures\n\0\n".to_vec();
    lines.extend(std::iter::repeat_n(b'0', 5 << 20));
    lines.extend_from_slice(b"\nfeatures\n");
    lines.extend(std::iter::repeat_n(b'x', 5 << 20));
    let answers = answers(&[], &lines);
    let starts = [
        "error line is not UTF-8",
        "features",
        "error unknown command",
        "error line of",
        "features",
        "error line of",
    ];
    assert_eq!(answers.len(), starts.len());
    for (answer, start) in answers.iter().zip(starts) {
        assert!(answer.starts_with(start) && answer.len() < 200, "{answer}");
    }
}

#[test]
fn reset_leaves_nothing_behind() {
    converse(
        &[],
        &[
            (attach(1, 8), status(OK)),
            (map(1, 0x1000, 0x1fff, 0xa000, 3), status(OK)),
            ("mem 0x40000000 01".into(), "ok".into()),
            ("reset".into(), "ok".into()),
            ("dma 8 - 0x1000 1 r".into(), "fault unattached".into()),
            (unmap(1, 0, 0xffff), status(NOENT)),
            (attach(1, 8), status(OK)),
            ("dma 8 - 0x1000 1 r".into(), "fault unmapped".into()),
            // Guest memory is not the device's.
            ("peek 0x40000000 1".into(), "01".into()),
        ],
    );
}

#[test]
fn whatever_is_typed_gets_one_answer() {
    let words = [
        "req",
        "event",
        "mem",
        "peek",
        "dma",
        "again",
        "waiting",
        "respond",
        "time",
        "wait",
        "success",
        "features",
        "accept",
        "config",
        "config-write",
        "bind",
        "help",
        "-",
        "r",
        "w",
        "0",
        "4",
        "8",
        "16",
        "36",
        "516",
        "0x1000",
        "0x40000000",
        "0xffffffffffffffff",
        "0x10000000000000000",
        "-1",
        "00",
        "01",
        "0100000001000000080000000000000000000000",
        "0300",
        ",",
        "4,4",
        "00,,00",
        "0x",
        "\u{e9}",
        "\"",
    ];
    // A plain congruential generator (Knuth's MMIX numbers): the same lines each time.
    let mut state = 1u64;
    let mut next = |limit: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        usize::try_from(state >> 33).unwrap() % limit
    };
    let lines: Vec<String> = (0..20_000)
        .map(|_| {
            let count = 1 + next(6);
            // Mostly a command first.
            let mut line = vec![words[next(if count % 2 == 0 { words.len() } else { 17 })]];
            line.extend((1..count).map(|_| words[next(words.len())]));
            line.join(" ")
        })
        .collect();
    let answers = answers(&["--log", "off", "--page-requests", "8"], (lines.join("\n") + "\n").as_bytes());
    assert_eq!(answers.len(), lines.len());
    let good = answers.iter().filter(|answer| !answer.starts_with("error ")).count();
    assert!(good > 500, "{good}");
}
