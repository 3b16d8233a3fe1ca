// Colours for code: comments, strings, numbers, keywords and names that are called. Not a parser: one expression per
// kind of language finds the pieces, and whatever it does not know stays plain text.

const words = (text) => new Set(text.split(" "));

const C_WORDS =
  "break case const continue default do else enum extern for goto if inline return sizeof static struct switch " +
  "typedef union void volatile while int long short char float double unsigned signed bool true false";
const JS_WORDS =
  "async await break case catch class const continue default delete do else export extends false finally for from " +
  "function if import in instanceof let new null of return static super switch this throw true try typeof undefined " +
  "var void while yield interface type enum implements private public readonly as";

const SLASHES = "//[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)";
const HASH = "#[^\\n]*";
const QUOTED = "\"(?:\\\\.|[^\"\\\\\\n])*\"?|'(?:\\\\.|[^'\\\\\\n])*'?";
const TRIPLE = "\"\"\"[\\s\\S]*?(?:\"\"\"|$)|'''[\\s\\S]*?(?:'''|$)";
const BACKTICK = "`(?:\\\\.|[^`\\\\])*`?";

const kind = (comment, string, keywords, flags = "") => ({ comment, string, keywords: words(keywords), flags });

const PYTHON = kind(
  HASH,
  `[rbfuRBFU]{0,2}(?:${TRIPLE}|${QUOTED})`,
  "and as assert async await break case class continue def del elif else except False finally for from global if " +
    "import in is lambda match None nonlocal not or pass raise return self True try while with yield",
);
const SCRIPT = kind(SLASHES, `${QUOTED}|${BACKTICK}`, JS_WORDS);
const C = kind(SLASHES, QUOTED, C_WORDS);
const CPP = kind(
  SLASHES,
  QUOTED,
  `${C_WORDS} auto catch class constexpr delete explicit final friend namespace new noexcept nullptr operator override ` +
    "private protected public template this throw try typename using virtual",
);
const JAVA = kind(
  SLASHES,
  `${TRIPLE}|${QUOTED}`,
  `${C_WORDS} abstract boolean byte catch class extends final finally fun implements import instanceof interface new ` +
    "null override package private protected public record super this throw throws try val var when",
);
const GO = kind(
  SLASHES,
  `${QUOTED}|${BACKTICK}`,
  "break case chan const continue default defer else fallthrough for func go goto if import interface map package " +
    "range return select struct switch type var nil true false string int bool error",
);
const RUST = kind(
  SLASHES,
  '"(?:\\\\[\\s\\S]|[^"\\\\])*"?',
  "as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move mut " +
    "pub ref return self Self static struct super trait true type unsafe use where while",
);
const SHELL = kind(
  "(?<!\\S)#[^\\n]*",
  "\"(?:\\\\[\\s\\S]|[^\"\\\\])*\"?|'[^']*'?",
  "case do done elif else esac export fi for function if in local return then until while echo cd set source sudo",
);
const SQL = kind(
  "--[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)",
  "'(?:''|[^'])*'?",
  "select from where and or not null insert into values update set delete create table index view drop alter add join " +
    "left right inner outer full on as group by order having limit offset distinct union all case when then else end " +
    "in is like between exists primary key foreign references default unique with",
  "i",
);
const DATA = kind(HASH, QUOTED, "true false null yes no on off");
const JSON_LIKE = kind(SLASHES, QUOTED, "true false null");
const STYLE = kind("/\\*[\\s\\S]*?(?:\\*/|$)", QUOTED, "important media supports keyframes import from to");
const MARKUP = kind("<!--[\\s\\S]*?(?:-->|$)", "\"[^\"<>]*\"|'[^'<>]*'", "");

const LANGUAGES = {
  c: C, h: C, cpp: CPP, "c++": CPP, cc: CPP, hpp: CPP, cuda: CPP, csharp: JAVA, cs: JAVA, java: JAVA, kotlin: JAVA,
  kt: JAVA, swift: JAVA, scala: JAVA, go: GO, golang: GO, rust: RUST, rs: RUST, python: PYTHON, py: PYTHON,
  python3: PYTHON, javascript: SCRIPT, js: SCRIPT, jsx: SCRIPT, mjs: SCRIPT, typescript: SCRIPT, ts: SCRIPT,
  tsx: SCRIPT, php: SCRIPT, bash: SHELL, sh: SHELL, shell: SHELL, zsh: SHELL, console: SHELL, sql: SQL, yaml: DATA,
  yml: DATA, toml: DATA, ini: DATA, json: JSON_LIKE, jsonc: JSON_LIKE, css: STYLE, scss: STYLE, html: MARKUP,
  xml: MARKUP, svg: MARKUP,
};

const LONGEST = 50_000; // characters; more stays plain

const patterns = new Map();

function patternOf(language) {
  if (!patterns.has(language)) {
    const word = language === MARKUP ? "(?<=</?)[\\w:-]+" : "[A-Za-z_$][\\w$]*";
    const number = language === MARKUP ? "(?!)" : "\\b(?:0[xX][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\w*";
    const source = `(?<comment>${language.comment})|(?<string>${language.string})|(?<number>${number})|(?<word>${word})`;
    patterns.set(language, new RegExp(source, "g"));
  }
  return patterns.get(language);
}

function classOf(found, language, text) {
  const { comment, string, number, word } = found.groups;
  if (comment !== undefined) return "hl-comment";
  if (string !== undefined) return "hl-string";
  if (number !== undefined) return "hl-number";
  if (language === MARKUP) return "hl-keyword";
  if (language.keywords.has(language.flags === "i" ? word.toLowerCase() : word)) return "hl-keyword";
  return text[found.index + word.length] === "(" ? "hl-name" : "";
}

/** The code as nodes, coloured if the language is known. */
export function highlight(text, name) {
  const language = Object.hasOwn(LANGUAGES, name) ? LANGUAGES[name] : null;
  if (!language || text.length > LONGEST) return [document.createTextNode(text)];
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(patternOf(language))) {
    const style = classOf(found, language, text);
    if (!style) continue;
    if (found.index > at) nodes.push(document.createTextNode(text.slice(at, found.index)));
    const span = document.createElement("span");
    span.className = style;
    span.textContent = found[0];
    nodes.push(span);
    at = found.index + found[0].length;
  }
  nodes.push(document.createTextNode(text.slice(at)));
  return nodes;
}
