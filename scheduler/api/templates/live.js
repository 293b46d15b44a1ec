// While a job runs: fetches this page again and puts its content in place, so that nothing flickers and nothing jumps.
// Where scripts are off, the page reloads by itself.
(() => {
  const soon = () => setTimeout(look, 2000);
  const kept = () => [...document.querySelectorAll('main [id]')];
  async function look() {
    if (document.hidden || String(getSelection())) return soon();
    try {
      const answer = await fetch(location.origin + location.pathname + location.search, {cache: 'no-store'});
      if (!answer.ok) throw answer;
      const next = new DOMParser().parseFromString(await answer.text(), 'text/html');
      const open = kept().filter(e => e.open).map(e => e.id);
      const places = kept().map(e => [e.id, e.scrollLeft]);
      const focus = document.activeElement && document.activeElement.id;
      document.querySelector('main').replaceWith(next.querySelector('main'));
      for (const id of open) document.getElementById(id)?.setAttribute('open', '');
      for (const [id, x] of places) if (x) document.getElementById(id)?.scrollTo(x, 0);
      if (focus) document.getElementById(focus)?.focus({preventScroll: true});
      document.title = next.title;
      delete document.body.dataset.stale;
      if (!('live' in next.body.dataset)) return;
    } catch { document.body.dataset.stale = ''; }
    soon();
  }
  soon();
})();
