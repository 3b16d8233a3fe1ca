// The strip above the message box that says what went wrong and offers the way on.

import { byId, element, icon, iconButton } from "./dom.js";

const banner = byId("banner");

/** Show a message; `actions` are [label, function] pairs, the first of which is the one to take. */
export function showError(message, actions = []) {
  banner.replaceChildren(
    icon("warn"),
    element("p", {}, message),
    ...actions.map(([label, act], index) =>
      element(
        "button",
        {
          type: "button",
          class: index === 0 ? "button main" : "button",
          onclick: () => {
            hideError();
            act();
          },
        },
        label,
      ),
    ),
    iconButton("close", "Dismiss", hideError),
  );
  banner.hidden = false;
}

export function hideError() {
  banner.hidden = true;
  banner.replaceChildren();
}
