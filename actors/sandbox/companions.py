"""The few lines of other libraries that published tests load, so that a verdict does not depend on what is installed.

MBXP's JavaScript tests ask for lodash's `isEqual` and nothing else of it, its Perl tests for `Data::Compare`.
"""

LODASH = """\
const util = require("util"), Module = require("module");
// lodash compares 0 and -0 as equal, which isDeepStrictEqual does not.
function positive(value) {
  if (typeof value === "number") return value === 0 ? 0 : value;
  if (Array.isArray(value)) return value.map(positive);
  if (value !== null && typeof value === "object" && Object.getPrototypeOf(value) === Object.prototype) {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, positive(item)]));
  }
  return value;
}
const lodash = { isEqual: (a, b) => util.isDeepStrictEqual(positive(a), positive(b)) };
const load = Module._load;
Module._load = function (name, ...rest) { return name === "lodash" ? lodash : load.call(this, name, ...rest); };
"""

DATA_COMPARE = """\
package Companion;
$INC{'Data/Compare.pm'} = __FILE__;
package Data::Compare;
use strict;
use Scalar::Util qw(reftype);
sub import { no strict 'refs'; *{ caller() . '::Compare' } = \\&Compare; }
sub Compare {
    my ($x, $y) = @_;
    return !defined $x && !defined $y unless defined $x && defined $y;
    return 0 if ref $x ne ref $y;
    return $x eq $y unless ref $x;
    my $kind = reftype $x;
    return 0 if $kind ne reftype $y;
    return Compare($$x, $$y) if $kind eq 'SCALAR' || $kind eq 'REF';
    if ($kind eq 'ARRAY') {
        return 0 if @$x != @$y;
        Compare($x->[$_], $y->[$_]) || return 0 for 0 .. $#$x;
        return 1;
    }
    if ($kind eq 'HASH') {
        return 0 if keys %$x != keys %$y;
        (exists $y->{$_} && Compare($x->{$_}, $y->{$_})) || return 0 for keys %$x;
        return 1;
    }
    return $x == $y;
}
1;
"""

# Types are erased, not checked: a published solution with a wrong annotation still runs, as it would in a browser.
TRANSPILE = """\
const fs = require("fs"), path = require("path");
const [compiler, source, target] = process.argv.slice(2);
const ts = require(path.join(path.dirname(compiler), "..", "lib", "typescript.js"));
const options = { module: ts.ModuleKind.CommonJS, target: ts.ScriptTarget.ES2020, esModuleInterop: false };
const { outputText, diagnostics } = ts.transpileModule(fs.readFileSync(source, "utf8"), { compilerOptions: options, reportDiagnostics: true });
if (diagnostics.length) {
  console.error("SyntaxError: " + diagnostics.map((d) => ts.flattenDiagnosticMessageText(d.messageText, " ")).join("; "));
  process.exit(1);
}
fs.writeFileSync(target, outputText);
"""
