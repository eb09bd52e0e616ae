"use strict";

// A plot with its title, a sentence for screen readers and its values as a table. It is drawn when it is first seen, and
// again when what it shows or the theme changes.

// Plotly reads a few tags in labels: data must not be taken for them.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// Plotly lies in the page as text, and runs when the first plot is drawn: the page can be read before.
function plotly() {
  if (!window.Plotly) document.head.append(make("script", {}, document.getElementById("plotly").textContent));
  return window.Plotly;
}

const CONFIG = { displayModeBar: false, responsive: true };

const plotGrid = (section) => section.appendChild(make("div", { class: "plots" }));

class Plot {
  constructor(parent, title, whole = false) {
    this.title = make("h3", {}, title);
    this.area = make("div", { class: "plot", role: "img" });
    this.note = make("p", { class: "note" });
    this.details = make("details", {}, make("summary", {}, "Values as a table"));
    this.save = make("button", { type: "button", class: "save", "aria-label": `Save as PNG: ${title}` }, "Save as PNG");
    const foot = make("div", { class: "foot" }, this.details, this.save);
    this.figure = make("figure", whole ? { class: "whole" } : {}, this.title, this.note, this.area, foot);
    this.seen = false;
    parent.append(this.figure);
    this.details.addEventListener("toggle", () => this.fillTable());
    this.save.addEventListener("click", () => plotly().downloadImage(this.area, { format: "png", scale: 2, filename: title }));
    document.addEventListener("themechange", () => this.draw());
    whenSeen(this.figure, () => {
      this.seen = true;
      this.draw();
    });
  }

  // describe() gives { label, note, traces, height, layout, columns, rows }, or { empty } where there is nothing to plot.
  show(describe) {
    this.describe = describe;
    this.area.style.minHeight = `${this.height ?? 300}px`;
    this.draw();
    this.fillTable();
  }

  draw() {
    if (!this.seen || !this.describe) return;
    const found = this.describe();
    this.details.hidden = this.save.hidden = Boolean(found.empty);
    this.note.textContent = found.note ?? "";
    if (found.empty) {
      plotly().purge(this.area);
      this.area.style.minHeight = "0";
      this.area.setAttribute("aria-label", found.empty);
      this.area.replaceChildren(make("p", { class: "empty" }, found.empty));
      return;
    }
    if (this.area.querySelector(":scope > .empty")) this.area.replaceChildren();
    this.height = found.height ?? 300;
    this.area.style.minHeight = `${this.height}px`;
    this.area.setAttribute("aria-label", found.label);
    plotly().react(this.area, found.traces, layoutOf(found), CONFIG);
  }

  fillTable() {
    this.details.querySelector(".wide")?.remove();
    if (!this.details.open || !this.describe) return;
    const found = this.describe();
    if (found.empty) return;
    const name = `${this.title.textContent}, table`;
    this.details.append(
      make("div", { class: "wide", role: "region", tabindex: "0", "aria-label": name }, tableOf(found)),
    );
  }
}

function tableOf({ label, columns, rows }) {
  const head = columns.map((name) => make("th", { scope: "col" }, String(name)));
  const body = rows.map(([name, ...values]) => {
    const cells = values.map((value) => make("td", { class: "n" }, String(value)));
    return make("tr", {}, make("th", { scope: "row" }, String(name)), ...cells);
  });
  const thead = make("thead", {}, make("tr", {}, ...head));
  return make("table", {}, make("caption", {}, make("span", {}, label)), thead, make("tbody", {}, ...body));
}

function layoutOf({ height = 300, layout = {} }) {
  const [ink, soft, line, panel] = ["ink", "soft", "line", "panel"].map(themed);
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, fixedrange: true, automargin: true, tickcolor: line };
  const { xaxis = {}, yaxis = {}, ...rest } = layout;
  return {
    height,
    autosize: true,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: soft },
    paper_bgcolor: panel,
    plot_bgcolor: panel,
    margin: { l: 48, r: 12, t: 14, b: 40 },
    dragmode: false,
    hoverlabel: { bgcolor: panel, bordercolor: soft, font: { color: ink }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: ink }, traceorder: "normal" },
    ...rest,
    xaxis: { ...axis, showgrid: false, ...xaxis },
    yaxis: { ...axis, ...yaxis },
  };
}

const titled = (text) => ({ title: { text: plain(text), standoff: 8 } });
const named = (names, title) => ({ type: "category", ...titled(title), categoryorder: "array", categoryarray: names });

// A heat map of z[row][column] over named columns x and rows y. hover(row, column) says one field, value(z) writes it.
function heatMap({ label, x, y, z, xTitle, yTitle, value, hover, most, unit, marks }) {
  const text = z.map((row, r) => row.map((_, c) => plain(hover(r, c)).replace(/\n/g, "<br>")));
  const trace = {
    type: "heatmap", x: x.map(String).map(plain), y: y.map(String).map(plain), z,
    colorscale: ramp(), zmin: 0, zmax: most ?? Math.max(...z.flat(), 1e-12),
    hoverinfo: "text", hovertext: text, xgap: x.length > 80 ? 0 : 1, ygap: 1,
    colorbar: { thickness: 10, outlinewidth: 0, len: 1, y: 0.5 },
  };
  if (marks) Object.assign(trace, { text: marks, texttemplate: "%{text}", textfont: { color: themed("soft") } });
  return {
    label,
    note: unit,
    traces: [trace],
    height: Math.min(620, Math.max(210, 90 + 26 * y.length)),
    layout: {
      xaxis: { ...named(trace.x, xTitle), ticks: "" },
      yaxis: { ...named(trace.y, yTitle), autorange: "reversed", showgrid: false, ticks: "" },
    },
    columns: [yTitle, ...x],
    rows: y.map((name, r) => [name, ...z[r].map(value)]),
  };
}

// Lines over the layers. lines: [{ name, x, y, low, high, text }]; low and high are lengths of the error bars.
function layerLines({ label, lines, yTitle, value, more = [] }) {
  const layers = distinct(lines.flatMap((line) => line.x)).sort((a, b) => a - b);
  const traces = lines.map((line, number) => ({
    type: "scatter", mode: "lines+markers", name: plain(line.name), x: line.x, y: line.y, ...lineStyle(number),
    hoverinfo: "text", hovertext: line.text.map((text) => plain(text).replace(/\n/g, "<br>")),
    error_y: line.high && {
      type: "data", symmetric: false, array: line.high, arrayminus: line.low, thickness: 1, width: 3,
      color: lineStyle(number).line.color,
    },
  }));
  return {
    label,
    traces: [...traces, ...more],
    layout: {
      xaxis: { ...titled("layer"), tickvals: layers, ticktext: layers.map(String), range: padded(layers) },
      yaxis: { ...titled(yTitle), rangemode: "tozero" },
      showlegend: true,
    },
    columns: ["Layer", ...lines.map((line) => line.name)],
    rows: layers.map((layer) => [layer, ...lines.map((line) => at(line, layer, value))]),
  };
}

const padded = (layers) => [layers[0] - 0.5, layers[layers.length - 1] + 0.5];

function at(line, layer, value) {
  const place = line.x.indexOf(layer);
  return place < 0 ? "" : value(line.y[place]);
}
