// One kind of chart: points in a plane, joined by a line where asked. It is drawn at the width it has, so its
// text keeps its size on every screen. Pointer and arrow keys walk the points; a table below holds the numbers.
//
//   chart({label, x: {label, format, from?, to?}, y: {...}, series: [{name, colour, mark, join, dash, points}],
//          rules: [{x, label}], bars: [{from, to, share}], square, diagonal})
//
// A point is {x, y, tip?, label?}: `tip` are further lines of its tooltip, `label` is written beside it.

const MARKS = {
  circle: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
  square: (r) => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  triangle: (r) => `M0,${-1.25 * r}L${1.2 * r},${r}H${-1.2 * r}z`,
  diamond: (r) => `M0,${-1.4 * r}L${1.4 * r},0L0,${1.4 * r}L${-1.4 * r},0z`,
};
const MARK_NAMES = Object.keys(MARKS);

function ticksBetween(from, to, about) {
  const rough = (to - from) / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= rough) * power;
  const ticks = [];
  for (let t = Math.ceil(from / step - 1e-9) * step; t <= to + step * 1e-6; t += step) ticks.push(Math.abs(t) < step / 1e6 ? 0 : t);
  return ticks;
}

function extent(axis, values) {
  let from = axis.from ?? Math.min(...values), to = axis.to ?? Math.max(...values);
  if (from === to) [from, to] = [from - Math.abs(from || 1) * 0.1, to + Math.abs(to || 1) * 0.1];
  const room = (to - from) * 0.06;
  return [axis.from ?? from - room, axis.to ?? to + room];
}

function swatch(series) {
  return s("svg", { width: 26, height: 12, viewBox: "-13 -6 26 12", class: series.colour, "aria-hidden": "true" },
    series.join !== false && s("path", { class: "line", d: "M-12,0H12", "stroke-dasharray": series.dash }),
    series.mark && s("path", { class: series.hollow ? "mark hollow" : "mark", d: MARKS[series.mark](4) }));
}

function chart(spec) {
  const series = spec.series.map((each) => ({ ...each, points: each.points.filter((p) => isNumber(p.x) && isNumber(p.y)) }))
    .filter((each) => each.points.length > 0);
  const points = series.flatMap((each) => each.points.map((point) => ({ ...point, series: each })));
  if (points.length === 0) return h("p", { class: "empty" }, "There are no points to draw.");

  const box = h("div", { class: "plot" });
  const legend = series.length > 1 && h("ul", { class: "legend" }, series.map((each) => h("li", {}, swatch(each), each.name)));
  const numbers = h("details", { class: "numbers" }, h("summary", {}, "The numbers"),
    table(spec.label, ["series", spec.x.label, spec.y.label, "note"],
      points.map((p) => [p.series.name, spec.x.format(p.x), spec.y.format(p.y), [p.tip ?? []].flat().join(" · ")])));

  let drawn = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width > 0 && width !== drawn) requestAnimationFrame(() => { drawn = width; box.replaceChildren(draw(width)); });
  }).observe(box);
  return h("figure", { class: spec.square ? "chart square" : "chart" }, legend, box, spec.note && h("figcaption", {}, spec.note), numbers);

  function draw(width) {
    const height = spec.square ? Math.min(width, 300) : Math.round(Math.min(380, Math.max(260, width * 0.46)));
    const room = { left: 52, right: 18, top: 28, bottom: 44 };
    const [x0, x1] = extent(spec.x, points.map((p) => p.x)), [y0, y1] = extent(spec.y, points.map((p) => p.y));
    const right = width - room.right, bottom = height - room.bottom;
    const px = (x) => room.left + ((x - x0) / (x1 - x0)) * (right - room.left);
    const py = (y) => bottom - ((y - y0) / (y1 - y0)) * (bottom - room.top);

    const grid = [
      ticksBetween(y0, y1, 5).map((t) => [s("path", { class: "grid", d: `M${room.left},${py(t)}H${right}` }),
        s("text", { x: room.left - 8, y: py(t) + 4, "text-anchor": "end" }, spec.y.format(t))]),
      ticksBetween(x0, x1, Math.max(3, Math.floor(width / 110))).map((t) => [s("path", { class: "tick", d: `M${px(t)},${bottom}v5` }),
        s("text", { x: px(t), y: bottom + 19, "text-anchor": "middle" }, spec.x.format(t))]),
      s("path", { class: "axis", d: `M${room.left},${bottom}H${right}` }),
      s("text", { class: "name", x: 2, y: 13 }, spec.y.label),
      s("text", { class: "name", x: right, y: height - 6, "text-anchor": "end" }, spec.x.label),
      spec.diagonal && s("path", { class: "rule", d: `M${px(x0)},${py(x0)}L${px(x1)},${py(x1)}` }),
      (spec.bars ?? []).map((bar) => s("rect", { class: `bar ${spec.series[0].colour}`, x: px(bar.from) + 1,
        width: Math.max(1, px(bar.to) - px(bar.from) - 2), y: bottom - bar.share * (bottom - room.top), height: bar.share * (bottom - room.top) })),
      (spec.rules ?? []).filter((rule) => rule.x > x0 && rule.x < x1).map((rule) => [
        s("path", { class: "rule", d: `M${px(rule.x)},${room.top}V${bottom}` }),
        s("text", { class: "rulename", x: px(rule.x) + 5, y: room.top + 10 }, rule.label)]),
    ];
    const shapes = series.map((each) => s("g", { class: each.colour },
      each.join !== false && each.points.length > 1 && s("path", { class: "line", "stroke-dasharray": each.dash,
        d: "M" + each.points.map((p) => `${px(p.x).toFixed(1)},${py(p.y).toFixed(1)}`).join("L") }),
      each.mark && each.points.length <= 60 && each.points.map((p) => s("path", { class: each.hollow ? "mark hollow" : "mark",
        d: MARKS[each.mark](each.size ?? 4), transform: `translate(${px(p.x).toFixed(1)},${py(p.y).toFixed(1)})` }))));
    const ring = s("circle", { class: "ring", r: 9, visibility: "hidden" });
    const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", tabindex: 0,
      "aria-label": `${spec.label}. Arrow keys walk the points.` }, grid, shapes, labels(), ring);

    // The nearest point answers, so a small mark is as easy to hit as a large one.
    let at = -1;
    const select = (i) => {
      at = i;
      const p = points[i];
      ring.setAttribute("cx", px(p.x)); ring.setAttribute("cy", py(p.y)); ring.setAttribute("visibility", "visible");
      showTip([h("b", {}, p.series.name), [p.tip ?? []].flat().map((line) => h("div", {}, line)),
        h("div", {}, `${spec.y.label}: `, h("b", {}, spec.y.format(p.y))), h("div", {}, `${spec.x.label}: ${spec.x.format(p.x)}`)].flat(),
        () => ring.getBoundingClientRect());
    };
    const leave = () => { at = -1; ring.setAttribute("visibility", "hidden"); hideTip(); };
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect(), x = event.clientX - frame.left, y = event.clientY - frame.top;
      const far = points.map((p) => Math.hypot(px(p.x) - x, py(p.y) - y)), nearest = far.indexOf(Math.min(...far));
      if (far[nearest] < 60) select(nearest); else leave();
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) { event.preventDefault(); select((at + step + points.length + (at < 0 && step < 0 ? 1 : 0)) % points.length); }
    });
    return svg;

    // A label stands right of its point, else left, above or below: the first place that is free.
    function labels() {
      const taken = points.map((p) => [px(p.x) - 6, py(p.y) - 6, px(p.x) + 6, py(p.y) + 6]);
      return points.filter((p) => p.label).map((p) => {
        const x = px(p.x), y = py(p.y), wide = p.label.length * 6.6;
        const places = [[x + 11, y + 4, "start", x + 11], [x - 11, y + 4, "end", x - 11 - wide],
          [x, y - 12, "middle", x - wide / 2], [x, y + 21, "middle", x - wide / 2]];
        const free = places.find(([, base, , from]) => from > room.left && from + wide < width - 2 && base > room.top + 4 && base < bottom &&
          !taken.some(([a, b, c, d]) => from < c && from + wide > a && base - 11 < d && base + 3 > b));
        if (!free) return null;
        taken.push([free[3], free[1] - 11, free[3] + wide, free[1] + 3]);
        return s("text", { class: "label", x: free[0], y: free[1], "text-anchor": free[2] }, p.label);
      });
    }
  }
}
