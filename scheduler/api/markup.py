"""The frame around every page of the API, its style and policy, and words of pages. Pure.

Style and script are constants, which the policy names by digest: nothing else is applied or run, and nothing is loaded
from anywhere. Elements are motet.markup's.
"""

from __future__ import annotations

import base64
import hashlib
from math import floor, log10

from motet.markup import PALETTE, Html, tag

# -- words


def number(value: float) -> str:
    """``12,345``, or ``1.23`` below ten."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 10 else f"{value:.2f}"


def compact(value: float) -> str:
    """``950``, ``12.3 k``, ``4.56 M``: three digits that count."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            shown = value / (1e3 if unit == "k" else size)
            return f"{shown:,.{max(0, 2 - floor(log10(abs(shown))))}f} {unit}"
    return number(value)


def duration(seconds: float) -> str:
    """``0.4 s``, ``42 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 4 h``."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if whole < 120:
        return f"{whole} s"
    if hours < 1:
        return f"{m} min {s:02} s"
    return f"{h} h {m:02} min" if days < 1 else f"{days} d {h} h"


def percent(share: float) -> str:
    """``38 %``; all but everything is not ``100 %``."""
    return f"{min(99, round(share * 100)) if share < 1 else 100} %"


def count(value: int, noun: str, nouns: str = "") -> str:
    """``1 row``, ``3,000 rows``."""
    return f"{value:,} {noun if value == 1 else nouns or noun + 's'}"


def moment(iso: str | None) -> str:
    """``2026-11-23 18:33:00 UTC`` of an RFC 3339 time."""
    return f"{iso[:10]} {iso[11:19]} UTC" if iso else "–"


# -- the frame

STYLE = (
    f"\n{PALETTE}"
    + """*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
header,main,footer{max-width:1080px;margin:0 auto;padding:0 20px}
header{padding-top:18px}footer{padding-top:12px;padding-bottom:40px}
nav,footer,.soft,small,caption{color:var(--soft)}
nav,footer,small,.small,caption,th{font-size:13px}
a{color:var(--link);text-decoration:none}a:hover,a:focus-visible{text-decoration:underline}
:focus-visible{outline:2px solid var(--link);outline-offset:2px;border-radius:3px}
h1{font-size:26px;line-height:1.25;font-weight:650;margin:10px 0 2px;overflow-wrap:anywhere}
h2{font-size:16px;font-weight:650;margin:38px 0 10px}
p{margin:4px 0;max-width:75ch}.head{max-width:none;overflow-wrap:anywhere}
svg{display:block;overflow:visible}text{fill:var(--soft);font-size:12px}
.state{display:inline-block;font-size:13px;font-weight:600;line-height:1;padding:4px 9px 5px;border-radius:99px;
border:1px solid currentColor;vertical-align:4px;margin-left:10px;white-space:nowrap}
td .state{margin:0;vertical-align:1px}
.loading,.cancelled{color:var(--soft)}.running{color:var(--link)}.succeeded{color:var(--ok)}.failed{color:var(--error)}
.partial{color:var(--skipped)}
.reason{border-left:3px solid var(--error);padding:6px 12px;background:var(--wash);margin:14px 0 0;max-width:none;
overflow-wrap:anywhere}
.reason.cancelled{border-color:var(--soft);color:inherit}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:14px 20px;margin:18px 0 0}
.figures div{border-top:1px solid var(--line);padding-top:6px}
dt{font-size:13px;color:var(--soft)}dd{margin:0}.figures dd{font-size:20px;line-height:1.3;font-weight:600}
.figures dd small{display:block;font-weight:400;line-height:1.35}
.bar{margin:18px 0 8px}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:6px 0;font-size:13px}
.key svg{display:inline-block;vertical-align:-1px;margin-right:6px}
.track{fill:var(--open)}.ok{fill:var(--ok)}.reused{fill:var(--reused)}.error{fill:var(--error)}
.skipped{fill:var(--skipped)}.grid{stroke:var(--line)}
.p0{fill:var(--p0)}.p1{fill:var(--p1)}.p2{fill:var(--p2)}.p3{fill:var(--p3)}.p4{fill:var(--p4)}.p5{fill:var(--p5)}
.p0.edge{stroke:var(--p0)}.p1.edge{stroke:var(--p1)}.p2.edge{stroke:var(--p2)}.p3.edge{stroke:var(--p3)}
.p4.edge{stroke:var(--p4)}.p5.edge{stroke:var(--p5)}
.edge{fill-opacity:.28;stroke-dasharray:3 2}
.hatch{stroke:var(--error);stroke-width:2}.lost{fill:url(#hatched);stroke:var(--error)}.hit{fill:transparent}
.hit:hover{fill:var(--soft);fill-opacity:.15}
.area{fill:var(--curve);fill-opacity:.2}.stroke{fill:none;stroke:var(--curve);stroke-width:1.5}.busy{fill:var(--curve)}
.pass{border-top:1px solid var(--line);padding:12px 0 14px;display:grid;grid-template-columns:1fr 1fr;gap:8px 36px}
.pass h3{font-size:15px;font-weight:600;margin:0 0 4px;overflow-wrap:anywhere}
.pass h3 svg{display:inline-block;vertical-align:-1px;margin-right:8px}
.chips{display:flex;flex-wrap:wrap;gap:6px;list-style:none;margin:6px 0;padding:0}
.chips li{background:var(--wash);border:1px solid var(--line);border-radius:5px;padding:1px 8px;font-size:13px;
overflow-wrap:anywhere;max-width:100%}
.pair{display:grid;grid-template-columns:max-content 1fr max-content;gap:2px 10px;align-items:center;font-size:13px}
.scroll{overflow-x:auto;margin:0 -4px;padding:0 4px}
table{border-collapse:collapse;width:100%}caption{text-align:left;padding-bottom:4px}
th{text-align:left;font-weight:500;color:var(--soft);white-space:nowrap}
th,td{padding:7px 16px 7px 0;border-bottom:1px solid var(--line);vertical-align:top}
tbody th{font-size:15px;font-weight:600;color:inherit;white-space:normal;overflow-wrap:anywhere}
tbody th small,td small{display:block;font-weight:400}
th:last-child,td:last-child{padding-right:0}
.scroll tbody th{min-width:7.5em;overflow-wrap:break-word}
.num{text-align:right;white-space:nowrap}.nowrap{white-space:nowrap}.words{overflow-wrap:anywhere;min-width:14em}
.meter{width:140px;min-width:110px;white-space:nowrap}.meter svg{margin:4px 0 2px}
.lane{display:grid;grid-template-columns:150px minmax(0,1fr);gap:0 14px;align-items:center;padding:3px 0}
.plot{display:grid;grid-template-columns:150px minmax(0,1fr);gap:0 14px;margin:20px 0 8px}
.who{font-size:13px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.usage{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:12px 20px;margin:0}
details{margin-top:10px}summary{cursor:pointer;color:var(--link);font-size:13px}
.filters{display:flex;flex-wrap:wrap;gap:4px 16px;margin:12px 0}[aria-current]{color:inherit;font-weight:600}
.stale{display:none;color:var(--error)}body[data-stale] .stale{display:inline}
@media(max-width:640px){header,main,footer{padding-left:14px;padding-right:14px}h1{font-size:22px}h2{margin-top:30px}
.pass,.lane{grid-template-columns:minmax(0,1fr)}.plot{grid-template-columns:44px minmax(0,1fr);gap:0 8px}
.meter{width:84px;min-width:84px}.meter .nowrap{white-space:normal}.wide{display:none}th,td{padding-right:12px}.state{margin-left:6px}
.figures{grid-template-columns:repeat(2,minmax(0,1fr))}.figures dd{font-size:18px}.words{min-width:10em}}
@media print{nav,.filters,details{display:none}}
"""
)

#: While a job runs: fetch this page again and put its content in place, so that nothing flickers and nothing jumps.
#: Without it the page reloads by itself.
SCRIPT = """
(() => {
  const soon = () => setTimeout(look, 2000);
  const kept = () => [...document.querySelectorAll('main [id]')];
  async function look() {
    if (document.hidden || String(getSelection())) return soon();
    try {
      const answer = await fetch(location.origin + location.pathname + location.search, {cache: 'no-store'});
      if (!answer.ok) throw answer;
      const next = new DOMParser().parseFromString(await answer.text(), 'text/html');
      const open = kept().filter(e => e.open).map(e => e.id);
      const places = kept().map(e => [e.id, e.scrollLeft]);
      const focus = document.activeElement && document.activeElement.id;
      document.querySelector('main').replaceWith(next.querySelector('main'));
      for (const id of open) document.getElementById(id)?.setAttribute('open', '');
      for (const [id, x] of places) if (x) document.getElementById(id)?.scrollTo(x, 0);
      if (focus) document.getElementById(focus)?.focus({preventScroll: true});
      document.title = next.title;
      delete document.body.dataset.stale;
      if (!('live' in next.body.dataset)) return;
    } catch { document.body.dataset.stale = ''; }
    soon();
  }
  soon();
})();
"""


def _digest(content: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"


#: Content-Security-Policy of every page.
POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src {_digest(STYLE)}",
        f"script-src {_digest(SCRIPT)}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def document(title: str, nav: Html, *content: object, live: bool = False) -> str:
    """A whole page. ``live``: it renews its content, by script or else by reloading."""
    reload = tag("noscript", tag("meta", http_equiv="refresh", content="4")) if live else None
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{title} · motet"),
        reload,
        tag("style", Html(STYLE)),
    )
    body = tag(
        "body",
        tag("header", nav),
        tag("main", *content),
        tag(
            "footer",
            "motet ",
            tag("span", "· no answer now; trying again", class_="stale", role="status") if live else None,
        ),
        tag("script", Html(SCRIPT)) if live else None,
        data_live=live or None,
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en")
