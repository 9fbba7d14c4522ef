/* Draws passes over a canvas in an element, with a slider over them. `data` is what show/html.py makes.

   One renderer for the page that `dgemma replay --html` writes, for notebooks, and for whatever serves events. All text
   is put in as text, never as markup; styles are in a shadow root, so that neither page touches the other. */
function dgemmaCanvas(host, data) {
  const STATES = ["changing", "guess", "accepted", "settled", "held"];
  const PACE = 450;  // milliseconds of a pass while it plays
  const WIDEST = 8;  // characters of shade for one changing token
  const root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
  root.replaceChildren(host.querySelector("template").content.cloneNode(true));
  const part = (name) => root.querySelector(`[part~="${name}"]`);
  const [canvas, slider, play, count, detail, bars] =
    ["canvas", "slider", "play", "count", "detail", "bars"].map(part);
  const { passes, texts, said } = data;
  const stops = passes.length + (data.figures === null ? 0 : 1);  // the last shows the text alone
  let at = stops - 1, chosen = -1, timer = null;

  const span = (text, name) => {
    const one = document.createElement("span");
    one.textContent = text;
    if (name) one.className = name;
    return one;
  };
  const spoken = (pass) => said.slice(0, pass.said).map(([kind, text]) => span(text, kind));
  const shown = (state, text) => state === 0 ? "\u2591".repeat(Math.min(Math.max(text.length, 1), WIDEST)) : text;

  function spans(pass) {
    const found = pass.tokens.map((token, i) => {
      const one = span(shown(pass.states[i], texts[token]), STATES[pass.states[i]]);
      one.dataset.span = i;
      return one;
    });
    if (pass.end >= 0) found.push(span("\u220e", STATES[pass.end]));
    if (pass.blank) found.push(span("\u00b7".repeat(pass.blank), "faint"));
    return found;
  }

  function summary(pass) {
    const canvases = new Set(passes.map((one) => one.canvas)).size > 1 || pass.canvas > 0;
    return [
      `step ${pass.step + 1} of at most ${pass.steps}`, ...(canvases ? [`canvas ${pass.canvas + 1}`] : []),
      `accepted ${pass.accepted} of ${pass.free}`, `entropy ${pass.entropy.toFixed(3)} nats`,
      ...(pass.log === undefined ? [] : [`log accept ${pass.log === null ? "-∞" : pass.log.toFixed(3)}`]),
    ].join(" · ");
  }

  function draw() {
    const pass = passes[at];
    if (pass) canvas.replaceChildren(...spoken(pass), ...spans(pass));
    else canvas.replaceChildren(...said.map(([kind, text]) => span(text, kind)));
    const where = pass ? summary(pass) : data.figures;
    count.textContent = where ?? "";
    slider.value = String(Math.max(at, 0));
    slider.setAttribute("aria-valuetext", pass ? `pass ${at + 1} of ${passes.length}: ${where}` : `the text: ${where}`);
    bars.querySelectorAll("i").forEach((bar, i) => bar.classList.toggle("now", i === at));
    choose(chosen);
  }

  function choose(i) {
    const pass = passes[at];
    root.querySelector(".chosen")?.classList.remove("chosen");
    chosen = pass ? Math.min(i, pass.tokens.length - 1) : -1;
    const one = chosen < 0 ? null : canvas.querySelector(`[data-span="${chosen}"]`);
    detail.textContent = one ? about(pass, chosen) : detail.dataset.hint ?? "";
    one?.classList.add("chosen");
  }

  function about(pass, i) {
    const from = pass.widths ? pass.widths.slice(0, i).reduce((sum, width) => sum + width, 0) : i;
    const text = JSON.stringify(texts[pass.tokens[i]]);
    const reads = pass.reads?.[i] ?? -1;
    const other = reads >= 0 && reads !== pass.tokens[i] ? `, the next pass reads ${JSON.stringify(texts[reads])}` : "";
    const entropy = pass.entropies[i] === null ? "no number" : `${(pass.entropies[i] / 1000).toFixed(3)} nats`;
    return `position ${from}: ${text}, token ${pass.ids[i].join(" ")}, ${STATES[pass.states[i]]}, ${entropy}${other}`;
  }

  function go(to) {
    at = Math.min(Math.max(to, 0), stops - 1);
    draw();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  function start() {
    if (at >= stops - 1) go(0);
    play.textContent = "Pause";
    timer = setInterval(() => {
      go(at + 1);
      if (at >= stops - 1) stop();
    }, PACE);
  }

  const highest = Math.max(...passes.map((pass) => pass.entropy), 1e-9);
  bars.replaceChildren(...passes.map((pass) => {
    const bar = document.createElement("i");
    bar.style.height = `${Math.max(6, 100 * pass.entropy / highest)}%`;
    return bar;
  }), ...(stops > passes.length ? [document.createElement("i")] : []));
  part("title").textContent = data.title;
  slider.max = String(Math.max(stops - 1, 0));
  part("controls").hidden = data.live || stops < 2;
  slider.addEventListener("input", () => { stop(); go(Number(slider.value)); });
  play.addEventListener("click", () => timer === null ? start() : stop());
  canvas.addEventListener("pointerover", (event) => {
    const i = event.target.dataset?.span;
    if (i !== undefined) choose(Number(i));
  });
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by === undefined || !passes[at]) return;
    event.preventDefault();
    choose(Math.max(chosen + by, 0));
  });
  draw();
}
