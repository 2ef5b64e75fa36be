//! Page requests, answers, time, and what ends the waiting.

use super::super::op::{Op, Twist};
use super::{Hints, Source, access, attach, attach_table_to, attached, head, invalidate, le, tables, write};

/// Little else.
pub(super) fn focused(source: &mut Source<'_, '_>, hints: &Hints) -> Op {
    let request = |readable| Op::Request { readable, writable: 4, cut: 1 };
    let is_attached = |id: u32| hints.attached.iter().any(|&(attached, _)| attached == id);
    let missing = hints.endpoints.iter().find(|endpoint| !is_attached(endpoint.0));
    if let Some(&(id, _)) = missing {
        return request(attach_table_to(source, hints, id, 1 + id % 2));
    }
    match source.below(64) {
        0..16 => access(source, hints),
        16 | 17 => write(source, hints),
        18..20 => tables::unmap(source, hints),
        20..31 => Op::TakeEvent { len: source.pick(&[48, 48, 48, 48, 48, 48, 48, 64, 47, 24, 0]) },
        31..52 => any(source, hints),
        52..55 => request(invalidate(source, hints)),
        55..58 => {
            let (id, domain) = attached(source, hints);
            request(attach_table_to(source, hints, id, domain))
        }
        58..61 => {
            // Format NONE.
            let (id, domain) = attached(source, hints);
            let mut bytes = [head(6), le(&[domain, id, 0, source.pasid()])].concat();
            bytes.resize(124, 0);
            request(bytes)
        }
        61 => {
            let (id, domain) = attached(source, hints);
            request([head(2), le(&[domain, id]), vec![0; 8]].concat())
        }
        62 => request(attach(source, hints)),
        _ => Op::Time { by: source.pick(&[1, 99, 100, 999, 1000]) },
    }
}

/// About page requests.
pub(super) fn any(source: &mut Source<'_, '_>, hints: &Hints) -> Op {
    match source.below(24) {
        0..6 => answer(source),
        6..10 => Op::Serve { which: source.below(8) },
        10..19 => make_up(source, hints),
        19..21 => Op::Forget { which: source.below(8) },
        21 | 22 => Op::Time { by: source.pick(&[0, 1, 1, 50, 99, 100, 500, 999, 1000, 1001, -5, i64::MAX]) },
        _ => Op::Fail,
    }
}

fn answer(source: &mut Source<'_, '_>) -> Op {
    let twist = match source.below(24) {
        16 => Twist::Pasid(source.pasid()),
        17 => Twist::Tagged,
        18 => Twist::Group(source.pick(&[1, 0xffff, 0x100])),
        19 => Twist::Endpoint(source.pick(&[8, 9, 16, 17, 7])),
        20 | 21 => Twist::Again,
        22 => Twist::Bit(source.below(28 * 8)),
        _ => Twist::None,
    };
    Op::Answer { which: source.below(64), twist, code: source.pick(&[0, 0, 0, 0, 1, 1, 2, 2, 3, 0x100]) }
}

/// Of few groups, so that they meet.
fn make_up(source: &mut Source<'_, '_>, hints: &Hints) -> Op {
    let id = attached(source, hints).0;
    let pasid = match source.below(4) {
        0 => None,
        _ => Some(source.pasid() & 0xf_ffff),
    };
    let private = if source.one_in(4) { Some([source.word(), source.word()]) } else { None };
    Op::MakeUp {
        id,
        pasid,
        group: source.below(3) as u16,
        last: source.below(2) == 1,
        flags: source.pick(&[1, 2, 3, 5, 9, 15]),
        private,
    }
}

/// PAGE_RESP of a group that most likely is not there.
pub(super) fn response(source: &mut Source<'_, '_>, hints: &Hints) -> Vec<u8> {
    let id = attached(source, hints).0;
    let flags = source.pick(&[1, 1, 1, 0, 0, 2, 3]);
    let group = u32::from(source.pick(&[0_u16, 1, 2, 3, 0x8000, 0x8001]));
    let code = source.pick(&[0, 0, 1, 2, 3]);
    [head(8), le(&[id, flags, source.pasid(), group | code << 16]), vec![0; 8]].concat()
}
