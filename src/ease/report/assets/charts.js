// One kind of chart: points in a plane, optionally joined by lines. It is drawn at its actual width, so that text has
// the same size on every screen. Pointer and arrow keys select points; a table below holds the numbers.
//
//   chart({label, note, x: {label, format, from?, to?}, y: {...}, square?, diagonal?,
//          series: [{name, colour, mark, size?, hollow?, join?, dash?, points: [{x, y, tip?, label?}]}],
//          rules: [{x, label}], bars: [{from, to, share}]})
//
// `tip` is an additional line of a point's tooltip, `label` is drawn next to it, `colour` is a class.

const MARKS = {
  circle: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
  square: (r) => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  triangle: (r) => `M0,${-1.25 * r}L${1.2 * r},${r}H${-1.2 * r}z`,
  diamond: (r) => `M0,${-1.4 * r}L${1.4 * r},0L0,${1.4 * r}L${-1.4 * r},0z`,
};
const MARK_NAMES = Object.keys(MARKS);
const markName = (i) => MARK_NAMES[i % MARK_NAMES.length];

// The legend symbol of a line; `join` adds a piece of its line.
function sign(series, join) {
  const half = join ? 13 : 7;
  return s(
    "svg",
    { width: 2 * half, height: 12, viewBox: `${-half} -6 ${2 * half} 12`, "aria-hidden": "true" },
    s(
      `g.${series.colour}`,
      join && s("path.line", { d: "M-12,0H12", "stroke-dasharray": series.dash }),
      s(series.hollow ? "path.mark.hollow" : "path.mark", { d: MARKS[series.mark](4.2) }),
    ),
  );
}

function ticksBetween(from, to, about) {
  const rough = (to - from) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= rough) * power;
  const ticks = [];
  for (let i = Math.ceil(from / step - 1e-9); i * step <= to + step * 1e-6; i++) ticks.push(i * step);
  return ticks;
}

function extent(axis, values) {
  let from = axis.from ?? Math.min(...values);
  let to = axis.to ?? Math.max(...values);
  if (from === to) [from, to] = [from - Math.abs(from || 1) * 0.1, to + Math.abs(to || 1) * 0.1];
  const room = (to - from) * 0.06;
  return [axis.from ?? from - room, axis.to ?? to + room];
}

function chart(spec) {
  const usable = ({ points }) => points.filter((point) => isNumber(point.x) && isNumber(point.y));
  const series = spec.series
    .map((each) => ({ ...each, points: usable(each) }))
    .filter(({ points }) => points.length > 0);
  const points = series.flatMap((each) => each.points.map((point) => ({ ...point, series: each })));
  if (points.length === 0) return empty("There are no points to draw.");

  const plot = h("div.plot");
  const legend = series.map((each) => h("li", sign(each, each.join !== false), each.name));
  const numbers = points.map((p) => [p.series.name, spec.x.format(p.x), spec.y.format(p.y), p.tip ?? ""]);
  let drawn = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width === 0 || width === drawn) return;
    drawn = width;
    requestAnimationFrame(() => plot.replaceChildren(draw(spec, series, points, width)));
  }).observe(plot);
  return h(
    spec.square ? "figure.chart.square" : "figure.chart",
    series.length > 1 && h("ul.legend", legend),
    plot,
    spec.note && h("figcaption", spec.note),
    h(
      "details.numbers",
      h("summary", "The numbers"),
      table(spec.label, ["series", spec.x.label, spec.y.label, ""], numbers),
    ),
  );
}

function draw(spec, series, points, width) {
  const height = spec.square ? Math.min(width, 300) : Math.round(Math.min(380, Math.max(260, width * 0.46)));
  const [left, right, top, bottom] = [52, width - 18, 28, height - 44];
  const [x0, x1] = extent(
    spec.x,
    points.map((p) => p.x),
  );
  const [y0, y1] = extent(
    spec.y,
    points.map((p) => p.y),
  );
  const px = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
  const py = (y) => bottom - ((y - y0) / (y1 - y0)) * (bottom - top);
  const place = (p) => `${px(p.x).toFixed(1)},${py(p.y).toFixed(1)}`;

  const frame = [
    ticksBetween(y0, y1, 5).map((t) => [
      s("path.grid", { d: `M${left},${py(t)}H${right}` }),
      s("text", { x: left - 8, y: py(t) + 4, "text-anchor": "end" }, spec.y.format(t)),
    ]),
    ticksBetween(x0, x1, Math.max(3, Math.floor(width / 110))).map((t) => [
      s("path.axis", { d: `M${px(t)},${bottom}v5` }),
      s("text", { x: px(t), y: bottom + 19, "text-anchor": "middle" }, spec.x.format(t)),
    ]),
    s("path.axis", { d: `M${left},${bottom}H${right}` }),
    s("text.name", { x: 2, y: 13 }, spec.y.label),
    s("text.name", { x: right, y: height - 6, "text-anchor": "end" }, spec.x.label),
    (spec.bars ?? []).map(({ from, to, share }) =>
      s(`rect.bar.${series[0].colour}`, {
        x: px(from) + 1,
        width: Math.max(1, px(to) - px(from) - 2),
        y: bottom - share * (bottom - top),
        height: share * (bottom - top),
      }),
    ),
    spec.diagonal && s("path.rule", { d: `M${px(x0)},${py(x0)}L${px(x1)},${py(x1)}` }),
    (spec.rules ?? [])
      .filter((rule) => rule.x > x0 && rule.x < x1)
      .map((rule) => [
        s("path.rule", { d: `M${px(rule.x)},${top}V${bottom}` }),
        s("text.over", { x: px(rule.x) + 5, y: top + 10 }, rule.label),
      ]),
  ];
  const drawSeries = ({ colour, mark, size = 4, hollow, join, dash, points: own }) =>
    s(
      `g.${colour}`,
      join !== false && s("path.line", { "stroke-dasharray": dash, d: `M${own.map(place).join("L")}` }),
      // Marks on a long curve would only make it thicker.
      own.length <= 60 &&
        own.map((p) =>
          s(hollow ? "path.mark.hollow" : "path.mark", {
            d: MARKS[mark](size),
            transform: `translate(${place(p)})`,
          }),
        ),
    );
  const ring = s("circle.ring", { r: 9, visibility: "hidden" });
  const svg = s(
    "svg",
    {
      viewBox: `0 0 ${width} ${height}`,
      width,
      height,
      role: "img",
      tabindex: 0,
      "aria-label": `${spec.label}. Arrow keys select points.`,
    },
    frame,
    series.map(drawSeries),
    labels(),
    ring,
  );

  let at = -1;
  function select(i) {
    at = i;
    const p = points[i];
    for (const [name, value] of Object.entries({ cx: px(p.x), cy: py(p.y), visibility: "visible" }))
      ring.setAttribute(name, value);
    showTip(
      [
        h("b", p.series.name),
        p.tip && h("div", p.tip),
        h("div", `${spec.y.label}: `, h("b", spec.y.format(p.y))),
        h("div", `${spec.x.label}: ${spec.x.format(p.x)}`),
      ].filter(Boolean),
      () => ring.getBoundingClientRect(),
    );
  }
  function leave() {
    at = -1;
    ring.setAttribute("visibility", "hidden");
    hideTip();
  }
  // The nearest point is selected, so that small marks are as easy to hit as large ones.
  svg.addEventListener("pointermove", (event) => {
    const corner = svg.getBoundingClientRect();
    const far = points.map((p) =>
      Math.hypot(px(p.x) - event.clientX + corner.left, py(p.y) - event.clientY + corner.top),
    );
    const nearest = far.indexOf(Math.min(...far));
    if (far[nearest] < 60) select(nearest);
    else leave();
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    select(at < 0 && step < 0 ? points.length - 1 : (at + step + points.length) % points.length);
  });
  return svg;

  // A label is drawn right of its point, else left, above or below it: at the first free place, or not at all.
  function labels() {
    const taken = points.map((p) => [px(p.x) - 6, py(p.y) - 6, px(p.x) + 6, py(p.y) + 6]);
    return points
      .filter((p) => p.label)
      .map((p) => {
        const [x, y, wide] = [px(p.x), py(p.y), p.label.length * 6.6];
        const free = ([from, base]) =>
          from > left &&
          from + wide < width - 2 &&
          base > top + 4 &&
          base < bottom &&
          !taken.some(([a, b, c, d]) => from < c && from + wide > a && base - 11 < d && base + 3 > b);
        const spot = [
          [x + 11, y + 4],
          [x - 11 - wide, y + 4],
          [x - wide / 2, y - 12],
          [x - wide / 2, y + 21],
        ].find(free);
        if (!spot) return null;
        taken.push([spot[0], spot[1] - 11, spot[0] + wide, spot[1] + 3]);
        return s("text.over.name", { x: spot[0] + wide / 2, y: spot[1], "text-anchor": "middle" }, p.label);
      });
  }
}
