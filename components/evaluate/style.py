"""The report's style sheet; it stands in the page itself, for a report must open anywhere and fetch nothing."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root{--ink:#1b2330;--soft:#5b6675;--line:#dfe4ea;--paper:#fff;--wash:#f5f7f9;--blue:#1d5fbf;--grey:#8c96a3;
--green:#1a7a45;--red:#b3261e;--amber:#9a6400}
*{box-sizing:border-box}
body{margin:0;background:var(--wash);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 20px 48px}
h1{font-size:24px;line-height:1.25;margin:0 0 2px;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 12px}
p{margin:0 0 10px}
section p:last-child{margin-bottom:0}
.sub{color:var(--soft);margin:0 0 18px;overflow-wrap:anywhere}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin:16px 0}
.banner{border-left:8px solid var(--tone);padding:16px 20px}
.banner strong{color:var(--tone);font-size:21px;display:block;margin-bottom:4px}
.banner ul{margin:4px 0 0;padding-left:20px}
.promote{--tone:var(--green)}.refuse{--tone:var(--red)}.not_enough_data{--tone:var(--amber)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:16px 0}
.tile{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.tile b{display:block;font-size:26px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 8px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th{font-weight:600;color:var(--soft);font-size:13px}
th:first-child,td:first-child{text-align:left}
tbody th{color:var(--ink);font-size:15px}
tbody tr.all th,tbody tr.all td{font-weight:700;border-bottom:2px solid var(--grey)}
td small{display:block;color:var(--soft);font-weight:400;font-size:12px}
td.words,th.words{white-space:normal;text-align:left;min-width:220px;overflow-wrap:anywhere}
.up{color:var(--green)}.down{color:var(--red)}
.ok::before{content:"✓ ";color:var(--green)}.no::before{content:"✗ ";color:var(--red)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(280px,1fr));gap:16px}
.charts h3,.group{font-size:14px;margin:0 0 4px;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto}
.forest{max-width:720px}
.grid{stroke:var(--line)}.axis{stroke:var(--ink)}.limit{stroke:var(--red);stroke-dasharray:3 3}
.tick{fill:var(--soft);font-size:10px}.label{fill:var(--ink);font-size:13px}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round}
.line.challenger{stroke:var(--blue)}.line.champion{stroke:var(--grey);stroke-dasharray:5 4}
.point{fill:var(--paper);stroke:var(--blue);stroke-width:2.5}
.range{stroke-width:4;stroke-linecap:round;opacity:.45}
.range.good,.dot.good{stroke:var(--green);fill:var(--green)}
.range.bad,.dot.bad{stroke:var(--red);fill:var(--red)}
.range.open,.dot.open{stroke:var(--grey);fill:var(--grey)}
.key{color:var(--soft);font-size:13px;margin-top:10px}
.key i{display:inline-block;width:22px;height:0;border-top:3px solid var(--blue);vertical-align:middle;margin:0 5px 0 14px}
.key i:first-child{margin-left:0}
.key i.champion{border-top:3px dashed var(--grey)}
.key i.truth{border-color:#35c46a}.key i.guess{border-color:#ffb020}.key i.error{border-color:#ff3b30}
.confusion{width:auto}.confusion th,.confusion td{text-align:center;border:1px solid var(--line);min-width:76px}
.confusion th{white-space:normal;overflow-wrap:anywhere;max-width:160px}
.confusion .corner{color:var(--soft);font-size:12px;border:0}
.confusion .hit{background:rgb(26 122 69/calc(var(--share)*.55))}
.confusion .off{background:rgb(179 38 30/calc(var(--share)*.55))}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:14px;margin-bottom:18px}
figure{margin:0;border:1px solid var(--line);border-radius:8px;overflow:hidden;background:var(--wash)}
figure svg{background:#111;aspect-ratio:4/3}
figcaption{padding:7px 10px;font-size:13px}
figcaption small{display:block;color:var(--soft);overflow-wrap:anywhere}
rect{fill:none;stroke-width:2}
rect.truth{stroke:#35c46a}rect.guess{stroke:#ffb020}rect.error{stroke:#ff3b30;stroke-width:4;stroke-dasharray:9 5}
text.truth,text.guess{font-size:12px;font-weight:600;paint-order:stroke;stroke:#000;stroke-width:3px}
text.truth{fill:#7ff0a8}text.guess{fill:#ffd27a}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
code{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:13px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:24px}
@media(max-width:560px){dl{grid-template-columns:1fr}dd{margin-bottom:6px}}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""
