// React's hooks for one component that is called again after every change of its state, as far as the example needs them.
let cells = [];
let at = 0;
let rendered;
export const shown = [];

export function render(component, ...given) {
  at = 0;
  rendered = () => {
    at = 0;
    const value = component(...given);
    shown.push(value);
    return value;
  };
  return rendered();
}
export function useState(initial) {
  const here = at++;
  cells[here] ??= { value: initial };
  const set = (next) => {
    cells[here].value = typeof next === "function" ? next(cells[here].value) : next;
    rendered();
  };
  return [cells[here].value, set];
}
export function useRef(initial) {
  return (cells[at++] ??= { current: initial });
}
export const useCallback = (what) => ((cells[at] ??= { what }), cells[at++].what);
export const useEffect = (effect) => (cells[at++] ??= { undo: effect() });
export const unmount = () => cells.forEach(({ undo }) => undo?.());
