"use strict";

// Selects that narrow rows one after the other: each offers what the ones before it leave.
// fields: [{ name, label, of: row => value, text: value => string, all: string or undefined }].
class Filters {
  constructor(parent, rows, fields) {
    this.rows = rows;
    this.fields = fields;
    this.chosen = {};
    this.selects = fields.map((field) => this.addSelect(field));
    this.bar = make("div", { class: "filters" }, ...this.selects.map(({ label }) => label));
    parent.append(this.bar);
  }

  // show(rows, chosen) is called now and after every choice; chosen maps a field's name to its value, null for all.
  follow(show) {
    this.show = show;
    this.update();
  }

  addSelect(field) {
    const select = make("select", { "data-filter": field.name });
    select.addEventListener("change", () => {
      this.chosen[field.name] = select.found[select.selectedIndex];
      this.update();
    });
    return { select, label: make("label", {}, field.label, select) };
  }

  update() {
    let rows = this.rows;
    this.fields.forEach((field, number) => {
      const values = distinct(rows.flatMap((row) => field.of(row)));
      if (field.all) values.unshift(null);
      if (!values.includes(this.chosen[field.name])) this.chosen[field.name] = values[0];
      const chosen = this.chosen[field.name];
      this.offer(this.selects[number].select, field, values, chosen);
      if (chosen !== null) rows = rows.filter((row) => [field.of(row)].flat().includes(chosen));
    });
    this.show(rows, this.chosen);
  }

  offer(select, field, values, chosen) {
    select.found = values;
    select.replaceChildren(
      ...values.map((value) => make("option", {}, value === null ? field.all : (field.text ?? String)(value))),
    );
    select.selectedIndex = values.indexOf(chosen);
  }
}

const BY_TASK = { name: "task", label: "Task", of: (cell) => cell.task };
const BY_MODALITY = { name: "modality", label: "Modality", of: (cell) => cell.modality };
const BY_LAYER = { name: "layer", label: "Layer", of: (cell) => cell.layer, text: (layer) => `layer ${layer}` };
const BY_EXPERT = {
  name: "expert",
  label: "Expert",
  of: (cell) => numbers(cell.num_experts),
  text: (expert) => `expert ${expert}`,
  all: "all experts",
};
