// Questions to the user. Each resolves when its dialog has closed; Escape is "cancel", and focus goes back.

import { byId, setText } from "./dom.js";

/** A key, or null. `wasRefused`: the one there was did not do. */
export async function askForKey(wasRefused) {
  const words = "This server answers those who have a key.";
  setText(byId("key-words"), wasRefused ? "That key is not known here. Try another one." : words);
  byId("key").value = "";
  const isGiven = (await closed(byId("ask-key"))) === "ok";
  return isGiven ? byId("key").value.trim() || null : null;
}

/** A title, or null. */
export async function askForTitle(title) {
  byId("new-title").value = title;
  byId("new-title").select();
  return (await closed(byId("ask-title"))) === "ok" ? byId("new-title").value : null;
}

/** New settings, or null. */
export async function askForSettings({ temperature, maxTokens, system }) {
  byId("temperature").value = temperature ?? "";
  byId("max-tokens").value = maxTokens ?? "";
  byId("system").value = system;
  if ((await closed(byId("settings"))) !== "ok") return null;
  return {
    temperature: numberOf(byId("temperature")),
    maxTokens: numberOf(byId("max-tokens")),
    system: byId("system").value,
  };
}

/** Asks, then runs `remove()`, whose failure is shown. True if the conversation shall go from this browser. */
export async function askToDelete(title, remove) {
  const confirm = byId("delete-confirm");
  const failure = byId("delete-failure");
  const dialog = byId("ask-delete");
  setText(byId("delete-words"), `“${title}” goes from this browser, and its memory from the server.`);
  failure.hidden = byId("delete-here").hidden = true;
  busy(confirm, false);
  confirm.onclick = async () => {
    busy(confirm, true);
    try {
      await remove();
      dialog.close("ok");
    } catch (error) {
      setText(failure, `Its memory could not be deleted. ${error.message}`);
      failure.hidden = byId("delete-here").hidden = false;
    }
    busy(confirm, false);
  };
  const answer = await closed(dialog);
  return answer === "ok" || answer === "here";
}

function busy(button, isBusy) {
  button.disabled = isBusy;
  setText(button, isBusy ? "Deleting…" : "Delete");
}

function numberOf(input) {
  return input.value === "" || !Number.isFinite(input.valueAsNumber) ? null : input.valueAsNumber;
}

function closed(dialog) {
  dialog.returnValue = "cancel";
  dialog.querySelector("[data-close]").onclick = () => dialog.close("cancel"); // no submit button: Enter would press it
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}
