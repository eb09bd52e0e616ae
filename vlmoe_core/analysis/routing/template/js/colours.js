"use strict";

// The first eight are those of Okabe and Ito (2008). Each of the others lies farthest from all before it in OKLab, for
// normal sight and as simulated (Machado et al., 2009) for protan and deutan sight.
const EXPERT_COLOURS = [
  "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#8c8c8c",
  "#6c2217", "#81ffff", "#372c81", "#abcaab", "#765661", "#8181f4", "#ab370d", "#76ffab",
  "#96d5ff", "#414156", "#224cab", "#81b581", "#f4c06c", "#764181", "#61768b", "#6c7656",
  "#df8137", "#6c96d5", "#96b5c0", "#0d6c2c", "#0df4d5", "#4c81ca", "#416cd5", "#76d5d5",
];

// Past 32 experts colours repeat; the expert's number always stands beside its colour.
const colourOf = (expert) => EXPERT_COLOURS[expert % EXPERT_COLOURS.length];

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "cross", "star"];

// Lines differ in colour, dash and symbol.
function lineStyle(number) {
  const colours = isDark()
    ? ["#6cb6ea", "#f0ae3c", "#3cc9a0", "#e29ac3", "#f08a4b", "#b9c2cb", "#f0e442"]
    : ["#0072b2", "#b97a00", "#008763", "#b3568a", "#c65300", "#57616c", "#7d7500"];
  const colour = colours[number % colours.length];
  return {
    line: { color: colour, dash: DASHES[number % DASHES.length], width: 2 },
    marker: { color: colour, symbol: SYMBOLS[number % SYMBOLS.length], size: 8 },
  };
}

// What a variable of the style is now, light or dark.
function themed(name) {
  const probe = make("span", { style: `color: var(--${name}); display: none` });
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

const ramp = () => [
  [0, themed("low")],
  [0.5, themed("middle")],
  [1, themed("high")],
];

function swatch(expert) {
  return make("span", { class: "swatch", style: `background: ${colourOf(expert)}`, "aria-hidden": "true" });
}
