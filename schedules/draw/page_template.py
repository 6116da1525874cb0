"""The HTML, style and script of `page`. @@NAME@@ is filled in there."""

TEMPLATE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>@@TITLE@@</title>
<style>
  body { font: 13px/1.4 system-ui, sans-serif; margin: 12px 16px; color: #222; background: #fff; }
  h2 { font-size: 15px; margin: 14px 0 4px; }
  canvas { display: block; width: 100%; cursor: crosshair; }
  header { position: sticky; top: 0; background: #fffe; padding: 4px 0; z-index: 1; border-bottom: 1px solid #ddd; }
  .key { margin-right: 14px; white-space: nowrap; }
  .key i { display: inline-block; width: 12px; height: 12px; margin-right: 4px; vertical-align: -1px; border: 1px solid #999; }
  .hatch { background: repeating-linear-gradient(45deg, #fff 0 3px, #e9c6c6 3px 5px) !important; }
  button, label { font: inherit; margin-right: 10px; }
  table { border-collapse: collapse; margin: 4px 0 10px; }
  th, td { text-align: right; padding: 1px 12px 1px 0; font-variant-numeric: tabular-nums; font-weight: normal; }
  th { color: #666; }
  td.bar { width: 220px; text-align: left; white-space: nowrap; font-size: 0; }
  td.bar b { display: inline-block; height: 11px; }
  .busy { background: #2f6fbd; } .exposed { background: #c0392b; } .idle { background: #e4e4e4; }
  summary { color: #666; cursor: pointer; }
  #tip { position: fixed; display: none; pointer-events: none; background: #222; color: #fff; padding: 5px 8px;
         border-radius: 4px; white-space: pre; font-size: 12px; z-index: 2; }
</style>
</head>
<body>
<header>
  <button id="fit">whole step</button>
  @@ROWS@@
  @@LEGEND@@
  <span style="color:#666">wheel: zoom, drag: move, click: follow a micro-batch</span>
</header>
@@SECTIONS@@
<div id="tip"></div>
<script id="data" type="application/json">@@DATA@@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const END = Math.max(...data.timelines.map(t => t.end)) || 1;
const AXIS = 18, GAP = 6, FONT = "11px system-ui, sans-serif", SMALL = "9px system-ui, sans-serif";
const [START, STOP, COLOR, QUEUE, STAGE, MICROBATCH, LANE, PAIR, TEXT, LABEL] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9];
const view = {from: 0, to: END};
let followed = null;                               // [lane, micro-batch] to outline
const shown = name => { const box = document.getElementById(name); return !box || box.checked; };

const panels = data.timelines.map((timeline, number) => {
  const canvas = document.getElementById("canvas" + number);
  return {timeline, canvas, context: canvas.getContext("2d"), tracks: []};
});
const LEFT = 24 + Math.max(...panels.flatMap(({timeline, context}) => {
  context.font = FONT;
  return timeline.names.map(name => context.measureText(name).width);
}));

function layout(panel) {                           // y of every track, then the height of the canvas
  let y = AXIS, rank = -1;
  panel.tracks = [];
  panel.labels = [];
  for (const [of, name, tracks] of panel.timeline.rows) {
    const height = data.heights[name], top = y;
    if (of !== rank) { if (rank >= 0) y += GAP; rank = of; panel.labels.push([panel.timeline.names[rank], y + height / 2, FONT]); }
    if (!shown(name)) continue;
    for (const spans of tracks.length ? tracks : [[]]) {
      panel.tracks.push({rank, name, spans, y, height});
      y += height;
    }
    if (name !== "compute") panel.labels.push([name, (top + y) / 2, SMALL]);
  }
  panel.height = y + GAP;
  const ratio = window.devicePixelRatio || 1;
  panel.width = panel.canvas.clientWidth;
  panel.canvas.style.height = panel.height + "px";
  panel.canvas.width = panel.width * ratio;
  panel.canvas.height = panel.height * ratio;
  panel.context.setTransform(ratio, 0, 0, ratio, 0, 0);
}

const scale = panel => (panel.width - LEFT - 8) / (view.to - view.from);
const toX = (panel, time) => LEFT + (time - view.from) * scale(panel);
const toTime = (panel, x) => view.from + (x - LEFT) / scale(panel);

function firstVisible(spans, time) {               // spans of a track do not overlap, so their ends are sorted
  let low = 0, high = spans.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (spans[middle][STOP] < time) low = middle + 1; else high = middle;
  }
  return low;
}

function hatch(context, x, y, width, height) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.strokeStyle = "#e0b0b0";
  context.lineWidth = 1.5;
  context.beginPath();
  for (let k = Math.max(0, LEFT - x) - height; k < Math.min(width, 4000); k += 5) {
    context.moveTo(x + k, y + height);
    context.lineTo(x + k + height, y);
  }
  context.stroke();
  context.restore();
}

function draw(panel) {
  const {context, timeline} = panel;
  context.clearRect(0, 0, panel.width, panel.height);
  context.font = FONT;
  context.textBaseline = "middle";
  drawAxis(panel);
  context.textAlign = "right";
  for (const [text, y, font] of panel.labels) {
    context.font = font;
    context.fillStyle = font === FONT ? "#222" : "#888";
    context.fillText(text, LEFT - 8, y);
  }
  context.save();
  context.beginPath();
  context.rect(LEFT, 0, panel.width - LEFT, panel.height);
  context.clip();
  context.textAlign = "center";
  let drawn = 0;
  for (const {spans, y, height} of panel.tracks) {
    context.font = height < 16 ? SMALL : FONT;
    let painted = -1;                              // right end of the last span, to skip what is below a pixel
    for (let i = firstVisible(spans, view.from); i < spans.length && spans[i][START] <= view.to; i++) {
      const span = spans[i], x = toX(panel, span[START]), right = toX(panel, span[STOP]), width = right - x;
      if (width < 0.3 && right < painted + 0.7) continue;
      painted = right;
      drawn++;
      if (span[QUEUE] === "wait") { hatch(context, x, y, width, height - 1); continue; }
      const [background, ink] = data.colors[span[COLOR]];
      context.fillStyle = background;
      context.fillRect(x, y, Math.max(width - (width > 3 ? 0.6 : 0), 0.6), height - 1);
      if (span[PAIR] >= 0 && width > 4) { context.fillStyle = "#222"; context.fillRect(x, y + height - 2.5, width - 0.6, 1.5); }
      if (followed && followed[0] === span[LANE] && followed[1] === span[MICROBATCH]) {
        context.strokeStyle = "#d00000";
        context.lineWidth = 2;
        context.strokeRect(x + 1, y, Math.max(width - 2, 1), height - 1);
      }
      const short = timeline.texts[span[LABEL]], long = timeline.texts[span[TEXT]];
      if (!short) continue;
      const text = width > 14 * long.length + 10 ? long : short;
      if (width > (height < 16 ? 5.2 : 6.5) * text.length + 2) {
        context.fillStyle = ink;
        context.fillText(text, x + width / 2, y + height / 2);
      }
    }
  }
  context.strokeStyle = "#000";
  context.lineWidth = 1;
  context.setLineDash([3, 3]);
  context.beginPath();
  context.moveTo(toX(panel, timeline.end), AXIS - 4);
  context.lineTo(toX(panel, timeline.end), panel.height);
  context.stroke();
  context.setLineDash([]);
  context.restore();
  panel.canvas.dataset.drawn = drawn;
}

function drawAxis(panel) {
  const {context, timeline} = panel, length = view.to - view.from, about = Math.max(2, panel.width / 110);
  const power = Math.pow(10, Math.floor(Math.log10(length / about)));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s * about >= length) || 10 * power;
  context.textAlign = "center";
  for (let k = Math.ceil(view.from / step); k * step <= view.to; k++) {
    const x = toX(panel, k * step);
    context.fillStyle = "#eee";
    context.fillRect(x, AXIS - 4, 1, panel.height);
    context.fillStyle = "#666";
    context.fillText(String(+(k * step).toPrecision(8)) + timeline.unit, x, 7);
  }
}

function redraw() { for (const panel of panels) draw(panel); }
function relayout() { for (const panel of panels) layout(panel); redraw(); }

function show(from, to) {
  const length = Math.min(Math.max(to - from, END * 1e-5), END);
  view.from = Math.min(Math.max(from, 0), END - length);
  view.to = view.from + length;
  redraw();
}

function spanAt(panel, x, y) {
  const track = panel.tracks.find(t => y >= t.y && y < t.y + t.height);
  if (!track || x < LEFT) return null;
  const time = toTime(panel, x), span = track.spans[firstVisible(track.spans, time)];
  return span && span[START] <= time ? {track, span} : null;
}

function describe(panel, {track, span}) {
  const unit = panel.timeline.unit, number = value => +value.toPrecision(7) + unit;
  const lines = [panel.timeline.texts[span[TEXT]], `rank ${track.rank}, ${span[QUEUE]}`];
  if (span[STAGE] >= 0) lines.push(`stage ${span[STAGE]}, micro-batch ${span[MICROBATCH]}, lane ${span[LANE]}`);
  if (span[PAIR] >= 0) lines.push(`overlapped pair ${span[PAIR]}`);
  lines.push(`${number(span[START])} to ${number(span[STOP])}, takes ${number(span[STOP] - span[START])}`);
  return lines.join("\n");
}

const tip = document.getElementById("tip");
for (const panel of panels) {
  const {canvas} = panel;
  let grip = null;
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    const time = toTime(panel, Math.max(event.offsetX, LEFT)), factor = Math.exp(event.deltaY * 0.0015);
    show(time - (time - view.from) * factor, time + (view.to - time) * factor);
  }, {passive: false});
  canvas.addEventListener("mousedown", event => { grip = {x: event.offsetX, from: view.from, moved: false}; });
  window.addEventListener("mouseup", () => { grip = null; });
  canvas.addEventListener("mousemove", event => {
    if (grip && event.buttons) {
      const by = (event.offsetX - grip.x) / scale(panel);
      grip.moved ||= Math.abs(event.offsetX - grip.x) > 3;
      show(grip.from - by, grip.from - by + view.to - view.from);
    }
    const found = spanAt(panel, event.offsetX, event.offsetY);
    tip.style.display = found ? "block" : "none";
    if (!found) return;
    tip.textContent = describe(panel, found);
    tip.style.left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8) + "px";
  });
  canvas.addEventListener("mouseleave", () => { tip.style.display = "none"; });
  canvas.addEventListener("click", event => {
    if (grip && grip.moved) return;
    const found = spanAt(panel, event.offsetX, event.offsetY), span = found && found.span;
    const same = span && followed && followed[0] === span[LANE] && followed[1] === span[MICROBATCH];
    followed = span && span[MICROBATCH] >= 0 && !same ? [span[LANE], span[MICROBATCH]] : null;
    redraw();
  });
  canvas.addEventListener("dblclick", () => show(0, END));
}
document.getElementById("fit").addEventListener("click", () => show(0, END));
for (const box of document.querySelectorAll("header input")) box.addEventListener("change", relayout);
window.addEventListener("resize", relayout);
relayout();
</script>
</body>
</html>
"""
