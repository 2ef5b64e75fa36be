//! One page with everything in it: no script, nothing to fetch.

use std::fmt::Write as _;

use super::escape;
use super::svg::svg;
use crate::hil::outcome::{Comparison, Done, Outcome, Report, Tally, size, time};

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2430;--soft:#5c6675;--page:#fbfbfa;--card:#fff;--line:#d9dde3;\
--ok:#187a3c;--bad:#b3261e;--skip:#7a6a12;--stage1:#2f6fd0;--stage2:#7a8594;--stale:#c26a00;--iova:#e7effb;\
--gpa:#eef0f3;--memory:#e6f3ea}\
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#9aa5b4;--page:#14171c;--card:#1b1f26;--line:#333a45;\
--ok:#6fd08c;--bad:#ff8a80;--skip:#e0cb6a;--stage1:#7fb0ff;--stage2:#8d99a8;--stale:#ffb55c;--iova:#1f3050;\
--gpa:#2a303a;--memory:#1d3526}}\
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;max-width:64rem;\
padding:1.5rem}\
h1{font-size:1.5rem;margin:0 0 .25rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:1rem 0 .25rem}\
.verdict{font-weight:600}.ok{color:var(--ok)}.bad{color:var(--bad)}.skip{color:var(--skip)}\
table{border-collapse:collapse;width:100%;background:var(--card)}\
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}\
th{font-weight:600;color:var(--soft);font-size:.85rem}td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;\
white-space:nowrap}\
code,pre{font:13px/1.45 ui-monospace,monospace}td>code{white-space:nowrap}pre{white-space:pre-wrap;background:var(--card);border:1px solid var(--line);\
padding:.6rem;margin:.3rem 0;overflow-wrap:anywhere}\
ul{margin:.2rem 0;padding-left:1.1rem;color:var(--soft);font-size:.9rem}\
figure{margin:.5rem 0 1.5rem;padding:.75rem;background:var(--card);border:1px solid var(--line);border-radius:6px;\
overflow-x:auto}figcaption{color:var(--soft);font-size:.9rem;margin-bottom:.4rem}\
svg{width:100%;min-width:44rem;height:auto;display:block}\
svg text{fill:var(--ink);font:12px ui-monospace,monospace}svg .small{fill:var(--soft);font-size:10.5px}\
svg .head{text-anchor:middle;fill:var(--soft);font:600 12px system-ui,sans-serif}\
svg .access{text-anchor:end;font:12px system-ui,sans-serif}svg .reached{fill:var(--ok)}svg .faulted{fill:var(--bad)}\
svg text.stale{fill:var(--stale)}\
svg .box{stroke:var(--line);stroke-width:1}svg .iova{fill:var(--iova);stroke:var(--stage1)}svg .gpa{fill:var(--gpa)}\
svg .memory{fill:var(--memory)}svg .hole,svg .nowhere{fill:none;stroke:var(--bad);stroke-dasharray:4 3}\
svg .gone{fill:none;stroke:var(--stale);stroke-dasharray:4 3}\
svg .band{fill:none;stroke:var(--stage1);stroke-width:3;opacity:.75}svg .band.second{stroke:var(--stage2)}\
svg .band.stale{stroke:var(--stale);stroke-dasharray:6 4}";

/// The whole page.
pub(crate) fn html(report: &Report) -> String {
    let Tally { passed, failed, skipped } = report.tally();
    let (class, verdict) = match (failed, passed) {
        (0, 0) => ("skip", "Nothing was checked"),
        (0, _) => ("ok", "Passed"),
        _ => ("bad", "Failed"),
    };
    let elapsed = time(report.elapsed);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>viommu hil: {verdict}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <h1>Guest tables on this machine's hardware</h1>\n\
         <p class=\"verdict {class}\">{verdict}: {passed} passed, {failed} failed, {skipped} skipped in {elapsed}</p>\n"
    );
    facts(&mut page, report);
    for (subject, checks) in report.groups() {
        // Writing to a string cannot fail.
        let _ = writeln!(page, "<h2>{}</h2>", escape(subject));
        table(&mut page, &checks);
    }
    if !report.comparisons.is_empty() {
        page.push_str(
            "<h2>MAP/UNMAP requests against handover</h2>\n<p>The same work: map, DMA, unmap.</p>\n",
        );
    }
    for comparison in &report.comparisons {
        compare(&mut page, comparison);
    }
    let pictured: Vec<&Done> = report.checks.iter().filter(|check| !check.pictures.is_empty()).collect();
    if !pictured.is_empty() {
        page.push_str(
            "<h2>Address spaces</h2>\n<p>Blue: stage 1, the guest's own table. Grey: stage 2, the guest's memory. \
             Orange: a translation that the table does not have any more. Not to scale.</p>\n",
        );
    }
    for check in pictured {
        let _ = writeln!(page, "<h3>{} {}</h3>", escape(&check.subject), escape(check.name));
        for picture in &check.pictures {
            let caption = escape(&picture.title);
            let _ = writeln!(page, "<figure><figcaption>{caption}</figcaption>\n{}</figure>", svg(picture));
        }
    }
    page.push_str("</body>\n</html>\n");
    page
}

fn facts(page: &mut String, report: &Report) {
    page.push_str("<table>\n");
    for (name, value) in &report.facts {
        let _ = writeln!(page, "<tr><th scope=\"row\">{}</th><td>{}</td></tr>", escape(name), escape(value));
    }
    for subject in &report.subjects {
        let _ = writeln!(
            page,
            "<tr><th scope=\"row\">device</th><td><code>{}</code>, {}, endpoint {:#x}</td></tr>",
            escape(&subject.name),
            escape(&subject.engine),
            subject.endpoint
        );
    }
    page.push_str("</table>\n");
}

fn table(page: &mut String, checks: &[&Done]) {
    page.push_str(
        "<table>\n<thead><tr><th>check</th><th></th><th>what</th><th class=\"number\">time</th></tr></thead>\n<tbody>\n",
    );
    for check in checks {
        let (class, mark) = match check.outcome {
            Outcome::Passed => ("ok", "ok"),
            Outcome::Failed(_) => ("bad", "FAIL"),
            Outcome::Skipped(_) => ("skip", "skip"),
        };
        let _ = write!(
            page,
            "<tr><td><code>{}</code></td><td class=\"{class}\">{mark}</td><td>{}",
            escape(check.name),
            escape(check.claim)
        );
        match &check.outcome {
            Outcome::Passed => {}
            Outcome::Failed(why) => {
                let _ = write!(page, "<pre class=\"bad\">{}</pre>", escape(why));
            }
            Outcome::Skipped(why) => {
                let _ = write!(page, "<br><span class=\"skip\">skipped: {}</span>", escape(why));
            }
        }
        if !check.notes.is_empty() {
            page.push_str("<ul>");
            for note in &check.notes {
                let _ = write!(page, "<li>{}</li>", escape(note));
            }
            page.push_str("</ul>");
        }
        let _ = writeln!(page, "</td><td class=\"number\">{}</td></tr>", time(check.elapsed));
    }
    page.push_str("</tbody>\n</table>\n");
}

fn compare(page: &mut String, comparison: &Comparison) {
    let _ = writeln!(page, "<h3>{}</h3>\n<table>\n<thead><tr>", escape(&comparison.subject));
    for (index, head) in [
        "buffers",
        "way",
        "requests",
        "ioctls",
        "requests/buffer",
        "ioctls/buffer",
        "map+unmap/buffer",
        "DMA/buffer",
    ]
    .into_iter()
    .enumerate()
    {
        let class = if index < 2 { "" } else { " class=\"number\"" };
        let _ = write!(page, "<th{class}>{head}</th>");
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for row in &comparison.rows {
        let _ =
            write!(page, "<tr><td>{} × {}</td><td>{}</td>", row.buffers, size(row.buffer), escape(row.way));
        for number in [
            row.requests.to_string(),
            row.ioctls.to_string(),
            format!("{:.2}", row.each(row.requests)),
            format!("{:.2}", row.each(row.ioctls)),
            time(row.mapping / row.buffers.max(1)),
            time(row.dma / row.buffers.max(1)),
        ] {
            let _ = write!(page, "<td class=\"number\">{number}</td>");
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table>\n");
}
