"use strict";

// How many choices each expert wanted and got.

function showLoads(section) {
  const filters = new Filters(section, CELLS, [BY_TASK, BY_MODALITY, { ...BY_LAYER, label: "Layer of the bars" }]);
  const plots = plotGrid(section);
  const wanted = new Plot(plots, "Wanted, by layer");
  const got = new Plot(plots, "Got, by layer");
  const bars = new Plot(plots, "Wanted, got and dropped in one layer", true);
  filters.follow(([cell], { task, modality }) => {
    wanted.show(() => loadMap(layersOf(task, modality), "wanted"));
    got.show(() => loadMap(layersOf(task, modality), "got"));
    bars.show(() => loadBars(cell));
  });
}

// A load over the share of the choices that each expert would want if all wanted the same.
const timesEven = (cell, counts) => counts.map((count) => ratio(count * cell.num_experts, sum(cell.wanted)));

function loadMap(cells, kind) {
  const experts = numbers(Math.max(...cells.map((cell) => cell.num_experts)));
  const z = cells.map((cell) => timesEven(cell, cell[kind]));
  const most = Math.max(...cells.flatMap((cell) => timesEven(cell, cell.wanted)), 1);
  const [row, place] = highest(z);
  const { task, modality } = cells[0];
  const top = row < 0 ? "no token came" : `most at expert ${place} of layer ${cells[row].layer}, ${fixed(z[row][place])} times`;
  return heatMap({
    label: `Load ${kind} by each expert over an even load, ${task}, ${modality}, layers against experts: ${top}.`,
    x: experts, y: cells.map((cell) => cell.layer), z, most,
    xTitle: "expert", yTitle: "layer", unit: "times the even load", value: fixed,
    marks: z.map((values) => values.map((value) => (value === 0 ? "×" : ""))),
    hover: (r, c) =>
      c >= cells[r].num_experts
        ? "no such expert"
        : `layer ${cells[r].layer}, expert ${c}\n${kind} ${whole(cells[r][kind][c])}\n${fixed(z[r][c])} times the even load`,
  });
}

// Row and column of the largest value.
function highest(z) {
  const places = z.map(largest);
  const row = largest(z.map((values, r) => (places[r] < 0 ? null : values[places[r]])));
  return [row, row < 0 ? -1 : places[row]];
}

function loadBars(cell) {
  const total = sum(cell.wanted);
  if (!total) return { empty: `No token came to ${nameOf(cell)}.` };
  const names = numbers(cell.num_experts).map(String);
  const dropped = cell.wanted.map((count, expert) => count - cell.got[expert]);
  const text = names.map(
    (name, e) =>
      `expert ${name}<br>wanted ${whole(cell.wanted[e])} (${percent(cell.wanted[e] / total)})<br>got ${whole(cell.got[e])}` +
      `<br>dropped ${whole(dropped[e])} (${percent(ratio(dropped[e], cell.wanted[e]))})`,
  );
  const bar = (name, y, marker) => ({ type: "bar", name, x: names, y, marker, hoverinfo: "text", hovertext: text, textposition: "none" });
  const busiest = largest(cell.wanted);
  const even = total / cell.num_experts;
  return {
    label:
      `Choices of each expert in ${nameOf(cell)}: expert ${busiest} is wanted most, by ${percent(cell.wanted[busiest] / total)}` +
      ` of the choices; ${percent(1 - sum(cell.got) / total)} of all are dropped.`,
    traces: [
      bar("got", cell.got, { color: themed("middle") }),
      bar("dropped", dropped, { color: themed("panel"), pattern: { shape: "/", fgcolor: themed("soft"), size: 6 } }),
    ],
    layout: {
      barmode: "stack", bargap: 0.25,
      xaxis: named(names, "expert"),
      yaxis: titled("choices"),
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: even, y1: even, line: { color: themed("soft"), width: 1, dash: "dot" } }],
      annotations: [{ xref: "paper", x: 1, xanchor: "right", y: even, yanchor: "bottom", text: "even", showarrow: false }],
    },
    columns: ["Expert", "Wanted", "Got", "Dropped", "Mean gate"],
    rows: names.map((name, e) => [name, ...[cell.wanted, cell.got, dropped].map((v) => whole(v[e])), percent(cell.gate[e] ?? null)]),
  };
}
