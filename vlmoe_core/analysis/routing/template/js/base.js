"use strict";

// The data, and the few things that every section needs. Text from the data is only ever set as text.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SUMMARY = DATA.summary;
const CELLS = SUMMARY.cells;

// An element with attributes and children; a child that is a string becomes text.
function make(tag, attributes, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  found.append(...children);
  return found;
}

// Call back once, when the element comes near the screen.
function whenSeen(element, callback) {
  const observer = new IntersectionObserver(
    (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      callback();
    },
    { rootMargin: "300px" },
  );
  observer.observe(element);
}

const percent = (share) => (share === null ? "n/a" : `${(100 * share).toFixed(1)} %`);
const times100 = (share) => (share === null ? null : 100 * share);
const per100 = (value) => percent(value === null ? null : value / 100);
const fixed = (value) => (value === null ? "n/a" : value.toFixed(2));
const whole = (count) => (count === null ? "n/a" : count.toLocaleString("en-GB"));
const sum = (values) => values.reduce((total, value) => total + value, 0);
const ratio = (part, all) => (all ? part / all : null);
const distinct = (values) => [...new Set(values)];
const numbers = (length) => Array.from({ length }, (_, number) => number);

// The index of the largest value; -1 where there is none.
function largest(values) {
  let best = -1;
  values.forEach((value, place) => {
    if (value !== null && (best < 0 || value > values[best])) best = place;
  });
  return best;
}

const MODALITIES = distinct(CELLS.map((cell) => cell.modality));
const TASKS = distinct(CELLS.map((cell) => cell.task));

const nameOf = (cell) => `${cell.task}, ${cell.modality}, layer ${cell.layer}`;
const layersOf = (task, modality) =>
  CELLS.filter((cell) => cell.task === task && cell.modality === modality).sort((a, b) => a.layer - b.layer);
