// What is asked of the studio, and the token where the browser has not signed in.

const HERE = "'also outside of what training covered'";

/** What must hold and what to do, in one text, in the words of the page. */
export function sentence({ message, remedy }) {
  const text = remedy ? `${message}; ${remedy}` : message;
  return text.replace(/give (`allow_extrapolation`|--allow-extrapolation)/, `choose ${HERE}`);
}

/** An answer of the studio, or its refusal as an error with `message` and `remedy`. */
export async function asked(address, options = {}) {
  let answer;
  try {
    answer = await fetch(address, { credentials: "same-origin", ...options });
  } catch {
    throw Object.assign(new Error("the studio must answer; it does not"), { remedy: "is it still running?" });
  }
  if (answer.ok) return answer;
  if (answer.status === 401) showSignIn();
  const told = await answer.json().catch(() => ({ message: `the studio answered ${answer.status}`, remedy: "" }));
  throw Object.assign(new Error(told.message), { remedy: told.remedy, status: answer.status });
}

function showSignIn() {
  document.getElementById("studio").hidden = true;
  document.getElementById("signin").hidden = false;
  document.getElementById("token").focus();
}

document.getElementById("signin-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const token = document.getElementById("token");
  try {
    await asked("/api/session", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ token: token.value.trim() }),
    });
    location.replace("/");
  } catch (error) {
    document.getElementById("signin-error").textContent = sentence(error);
    token.select();
  }
});
