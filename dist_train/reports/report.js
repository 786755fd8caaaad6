// Draws the figures of the page in its colours and in its width. Their contents come from Python.
"use strict";
{
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const touch = matchMedia("(pointer: coarse)").matches;
  const off = new Set(); // the "run N" and "FIGURE PART" that are hidden
  const config = {
    displaylogo: false,
    displayModeBar: touch ? true : "hover",
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]], // no button that uploads data
    doubleClick: "reset",
  };

  // The value with names of colours replaced: "--c0", or "--c0 0.3" for an opacity of 0.3. color: whether it is the value
  // of a key for colours; elsewhere such a text may be the name of a class.
  function painted(value, styles, color = false) {
    if (color && typeof value === "string" && value.startsWith("--")) {
      const [name, share] = value.split(" ");
      const hex = styles.getPropertyValue(name).trim();
      return share ? hex + Math.round(255 * share).toString(16).padStart(2, "0") : hex;
    }
    if (Array.isArray(value)) return value.map((item) => painted(item, styles, color));
    if (value === null || typeof value !== "object") return value;
    const paint = ([key, item]) => [key, painted(item, styles, /color(scale)?$/.test(key))];
    return Object.fromEntries(Object.entries(value).map(paint));
  }

  function draw(plot) {
    if (!plot.clientWidth) return; // its run is hidden
    const styles = getComputedStyle(root);
    const data = painted(figures[plot.id].data, styles);
    for (const trace of data) {
      const { run, part } = trace.meta || {};
      trace.visible = !off.has(`run ${run}`) && !off.has(`${plot.id} ${part}`);
    }
    const family = getComputedStyle(document.body).fontFamily;
    const common = {
      width: plot.clientWidth,
      height: plot.clientHeight,
      margin: { l: 8, r: 8, t: 24, b: 8 },
      paper_bgcolor: "--page",
      plot_bgcolor: "transparent",
      font: { family, size: root.classList.contains("paper") || plot.clientWidth < 420 ? 10 : 12, color: "--ink" },
      hoverlabel: { bgcolor: "--raised", bordercolor: "--muted", font: { family, color: "--ink" }, align: "left", namelength: -1 },
      modebar: { bgcolor: "transparent", color: "--muted", activecolor: "--ink" },
      dragmode: touch ? false : "zoom", // so that a finger on a chart still scrolls the page
      uirevision: "kept",
    };
    const layout = painted({ ...common, ...figures[plot.id].layout }, styles);
    Plotly.react(plot, data, layout, { ...config, toImageButtonOptions: { filename: plot.id, scale: 2 } });
    if (!("fitted" in plot.dataset)) {
      plot.dataset.fitted = "";
      plot.on("plotly_relayout", (change) => Object.keys(change).some((key) => key.includes("range")) && fit(plot));
    }
    fit(plot);
    const [picture, ...others] = plot.querySelectorAll(".main-svg");
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", plot.dataset.alt);
    for (const other of others) other.setAttribute("aria-hidden", "true");
  }

  // Write what there is room for: names of classes at a distance at which they can be read, numbers where the cells of a
  // heat map are wide enough.
  function fit(plot) {
    const { _size: size, font, ...axes } = plot._fullLayout;
    const layout = {};
    const inSight = { xaxis: 0, yaxis: 0 };
    for (const [name, room] of [["xaxis", size.w], ["yaxis", size.h]]) {
      if (axes[name].type !== "category") continue;
      inSight[name] = Math.abs(axes[name].range[1] - axes[name].range[0]);
      const every = Math.max(1, Math.ceil((1.15 * font.size * inSight[name]) / room));
      for (const key of ["tickvals", "ticktext"]) {
        const values = figures[plot.id].layout[name][key].filter((_, number) => number % every === 0);
        if (values.length !== axes[name][key].length) layout[`${name}.${key}`] = values;
      }
    }
    const data = { texttemplate: [] };
    for (const { text, textfont, texttemplate } of figures[plot.id].data) {
      const longest = texttemplate ? Math.max(...text.flat().map((each) => each.length)) : 0;
      const fits = 0.6 * textfont?.size * longest + 3 < size.w / inSight.xaxis;
      data.texttemplate.push(fits ? texttemplate : "");
    }
    const heat = inSight.xaxis && figures[plot.id].data[0].texttemplate;
    if (heat || Object.keys(layout).length) Plotly.update(plot, heat ? data : {}, layout);
  }

  const plots = [...document.querySelectorAll(".plot")];
  const redraw = (which = plots) => which.forEach(draw);
  const curves = plots.filter((plot) => plot.closest("#curves"));

  // one figure after the other, so that the page stays responsive
  (async () => {
    for (const plot of plots) {
      if (!plot.data) draw(plot);
      await new Promise((done) => setTimeout(done));
    }
    root.dataset.drawn = "";
  })();

  // buttons that show and hide

  const runs = [...document.querySelectorAll(".runs button")];
  function show(buttons, key, which) {
    for (const button of buttons) button.setAttribute("aria-pressed", String(!off.has(key(button))));
    redraw(which);
  }
  const runOf = (button) => `run ${button.dataset.run}`;
  for (const button of runs) {
    button.addEventListener("click", () => {
      if (!off.delete(runOf(button))) off.add(runOf(button));
      show(runs, runOf, curves);
    });
    button.addEventListener("dblclick", () => {
      const others = runs.filter((other) => other !== button);
      const alone = !off.has(runOf(button)) && others.every((other) => off.has(runOf(other)));
      off.delete(runOf(button));
      for (const other of others) alone ? off.delete(runOf(other)) : off.add(runOf(other));
      show(runs, runOf, curves);
    });
  }
  for (const button of document.querySelectorAll(".legend button")) {
    const key = () => `${button.dataset.figure} ${button.dataset.part}`;
    button.addEventListener("click", () => {
      if (!off.delete(key())) off.add(key());
      show([button], key, [document.getElementById(button.dataset.figure)]);
    });
  }
  const choice = document.getElementById("panel");
  const choose = () => {
    for (const panel of document.querySelectorAll(".panel")) panel.hidden = panel.dataset.run !== choice.value;
    redraw(plots.filter((plot) => plot.closest(".panel")));
  };
  if (choice) {
    choice.addEventListener("change", choose);
    if (choice.selectedIndex) choose(); // the browser keeps the choice when the page is reloaded
  }

  // tables that are wider than the page, and commands to copy

  const tables = [...document.querySelectorAll(".scroll")];
  const mark = () => tables.forEach((table) => table.classList.toggle("wide", table.scrollWidth > table.clientWidth + 1));
  mark();
  for (const each of document.querySelectorAll("details")) each.addEventListener("toggle", mark);
  for (const button of document.querySelectorAll(".copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const command = button.parentElement.querySelector("code");
      getSelection().selectAllChildren(command); // for a copy by hand, where the browser does not let the page copy
      try {
        await navigator.clipboard.writeText(command.textContent);
        button.textContent = "copied";
      } catch {
        button.textContent = document.execCommand("copy") ? "copied" : "selected";
      }
      setTimeout(() => (button.textContent = "copy"), 2000);
    });
  }

  // light and dark, width, paper

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
  let width = document.body.clientWidth;
  new ResizeObserver(() => {
    if (width === (width = document.body.clientWidth)) return;
    mark();
    redraw();
  }).observe(document.body);
  let opened = [];
  addEventListener("beforeprint", () => {
    root.classList.add("paper");
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const each of opened) each.open = true;
    redraw();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("paper");
    for (const each of opened) each.open = false;
    redraw();
  });
}
