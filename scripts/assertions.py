"""Reading tests and notebooks for what lets them pass without checking anything; nothing is run."""
import ast
import re

ASSERTIONS = {"raises", "warns", "deprecated_call", "fail", "test", "test_eq", "test_eq_type", "test_ne", "test_close", "test_is", "test_shuffled",
              "test_stdout", "test_sig", "test_warns", "test_fail", "test_fig_exists", "ExceptionExpected", "gradcheck", "gradgradcheck"}
SET_UP = {"manual_seed", "seed", "append", "extend", "add", "update", "setdefault", "insert", "use", "set_num_threads", "set_default_dtype",
          "set_printoptions", "filterwarnings", "simplefilter", "requires_grad_", "zero_grad", "backward", "step", "copy_", "fill_", "mkdir", "write_text",
          "clear", "pop", "set_matplotlib_formats", "eval", "train"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(call):
    "The last name of what is called: `c` in `a.b.c(...)`."
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def same(a, b): return ast.dump(a) == ast.dump(b) and not any(isinstance(node, ast.Call) for node in ast.walk(a))


def cannot_fail(node):
    "An assertion of a constant, or of a thing against itself."
    if isinstance(node, ast.Call):
        return name_of(node) in ("test_eq", "test_close", "test_is", "assert_close", "assert_array_equal") and len(node.args) > 1 and same(*node.args[:2])
    test = node.test
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Eq, ast.Is, ast.LtE, ast.GtE)): return same(test.left, test.comparators[0])
    return isinstance(test, ast.Constant) and bool(test.value) or isinstance(test, ast.Tuple) and bool(test.elts)


def is_assertion(node):
    if isinstance(node, ast.Assert): return not cannot_fail(node)
    if not isinstance(node, ast.Call): return False
    silent = any(k.arg == "raise_exception" and getattr(k.value, "value", None) is False for k in node.keywords)
    return (name_of(node) in ASSERTIONS or bool(re.match(r"assert(_|[A-Z])", name_of(node)))) and not silent and not cannot_fail(node)


def asserts(statement, helpers=(), looping=False):
    "Whether running a statement surely checks something, itself or through one of the asserting `helpers`."
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)): return False
    if isinstance(statement, ast.If):  # one that might not be entered checks nothing, unless a loop comes past it with other cases
        branches = [any(asserts(s, helpers, looping) or isinstance(s, ast.Raise) for s in branch) for branch in (statement.body, statement.orelse)]
        return all(branches) or any(branches) and looping or any(isinstance(s, ast.Raise) for s in statement.body)
    blocks = [] if isinstance(statement, ast.Expr) else [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
    looping = looping or isinstance(statement, (ast.For, ast.While))
    if any(asserts(s, helpers, looping) for block in blocks for s in block): return True
    apart = {id(node) for block in (*blocks, getattr(statement, "handlers", [])) for s in block for node in ast.walk(s)}
    return any(is_assertion(node) or refers_to(node, helpers) for node in ast.walk(statement) if id(node) not in apart)


def refers_to(node, names):
    "Whether a node reads one of the names, as a variable or as a method of its own class."
    if isinstance(node, ast.Attribute): return getattr(node.value, "id", "") in ("self", "cls") and node.attr in names
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names


def asserting_functions(tree):
    "The names of the functions of a file that surely assert, directly or through each other."
    functions, found = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)], set()
    while new := {f.name for f in functions if f.name not in found and any(asserts(s, found) for s in f.body)}: found |= new
    return found


def swallows(handler):
    "An `except` that lets a failure pass unseen."
    kinds = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(handler.type)} if handler.type else {"BaseException"}
    if all(isinstance(s, (ast.Pass, ast.Continue)) or isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in handler.body): return True
    inside = [node for s in handler.body for node in ast.walk(s)]
    told = any(isinstance(n, ast.Raise) or isinstance(n, ast.Name) and handler.name and n.id == handler.name for n in inside)
    return bool(kinds & {"Exception", "BaseException"}) and not told


def code_problems(tree, where):
    "What makes any test vacuous: swallowed exceptions, assertions that hold always, skips without a reason."
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        at = f"{where} line {getattr(node, 'lineno', 1)}"
        if isinstance(node, ast.ExceptHandler) and swallows(node): yield f"{at} swallows an exception: name it, and say or check what happened."
        if isinstance(node, (ast.Assert, ast.Call)) and cannot_fail(node): yield f"{at} asserts what is always true: {ast.unparse(node)}."
        if isinstance(node, ast.Call) and name_of(node) == "suppress" and {"Exception", "BaseException"} & {getattr(a, "id", "") for a in node.args}:
            yield f"{at} suppresses every exception: name the one that is meant."
        if isinstance(node, (ast.Attribute, ast.Call)):
            target = node.func if isinstance(node, ast.Call) else node
            marks = ast.unparse(target) if isinstance(target, ast.Attribute) else ""
            if id(node) in called or not re.fullmatch(r"pytest\.(skip|xfail|mark\.(skip|skipif|xfail))", marks): continue
            given = [k.value for k in getattr(node, "keywords", []) if k.arg in ("reason", "msg")]
            if not marks.endswith(("skipif", "mark.xfail")): given += getattr(node, "args", [])
            if not any(not isinstance(r, ast.Constant) or isinstance(r.value, str) and r.value.strip() for r in given):
                yield f"{at} skips without a reason: {marks}."


def test_problems(path, where):
    "What lets a test of this file pass without checking anything."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = asserting_functions(tree)
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS) and node.name.startswith("test") and node.name not in known and path.name.startswith("test_"):
            yield f"{where} line {node.lineno}: {node.name} can pass without asserting anything."
    yield from code_problems(tree, where)


def only_prepares(statement):
    "A statement that defines, assigns or sets something up, and so has nothing to show."
    if isinstance(statement, ast.Expr):
        call = statement.value
        return isinstance(call, ast.Constant) or isinstance(call, ast.Call) and name_of(call) in SET_UP
    if isinstance(statement, (ast.For, ast.While, ast.If, ast.With, ast.Try)):
        return all(only_prepares(s) for name in ("body", "orelse", "finalbody") for s in getattr(statement, name, []))
    return isinstance(statement, (*FUNCTIONS, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Import, ast.ImportFrom, ast.Delete, ast.Pass))


class Uses:
    "Which names of a notebook each of its names leads to, followed cell by cell in the order they run."
    def __init__(self): self.leads, self.modules, self.origins = {}, set(), {}

    def ids(self, node):
        "The identifiers in a node, attributes of imported modules among them."
        for n in ast.walk(node):
            if isinstance(n, ast.Name): yield n.id
            elif isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in self.modules: yield n.attr

    def reach(self, names):
        "All that `names` lead to, themselves included."
        found, waiting = set(), list(names)
        while waiting:
            if (name := waiting.pop()) not in found:
                found.add(name)
                waiting += self.leads.get(name, ())
        return found

    def target(self, node, used, keep):
        "Record that the root of an assignment's target now leads to `used`."
        if isinstance(node, (ast.Tuple, ast.List)):
            for item in node.elts: self.target(item, used, keep)
            return
        keep = keep or not isinstance(node, (ast.Name, ast.Starred))
        while not isinstance(node, ast.Name) and hasattr(node, "value"): node = node.value
        if isinstance(node, ast.Name): self.leads[node.id] = used | (self.leads.get(node.id, set()) if keep else set())

    def define(self, statement, exported):
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            module = (getattr(statement, "module", None) or "").removeprefix("theria.")
            for alias in statement.names:
                name = (alias.asname or alias.name).partition(".")[0]
                self.modules.add(name)
                self.origins[name] = module, alias.name
        elif isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
            self.leads[statement.name] = self.leads.get(statement.name, set()) | set(self.ids(statement))
            for decorator in statement.decorator_list:  # a registered function is reached through its register
                for name in self.ids(decorator):
                    if name in self.leads: self.leads[name] = self.leads[name] | {statement.name}
            for node in ast.walk(statement):  # and the register through the table it fills
                if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") in self.leads:
                    self.leads[node.value.id] = self.leads[node.value.id] | {statement.name}
        elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            used = set(self.ids(statement.value)) if statement.value else set()
            for node in getattr(statement, "targets", None) or [statement.target]:
                self.target(node, used if exported else self.reach(used), exported or isinstance(statement, ast.AugAssign))
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) and isinstance(statement.value.func, ast.Attribute):
            if isinstance(statement.value.func.value, ast.Name) and statement.value.func.value.id in self.leads:
                self.target(statement.value.func, self.reach(self.ids(statement)), True)
        else:
            if isinstance(statement, ast.For): self.target(statement.target, self.reach(self.ids(statement.iter)), False)
            for item in getattr(statement, "items", []):
                if item.optional_vars: self.target(item.optional_vars, self.reach(self.ids(item.context_expr)), False)
            for name in ("body", "orelse", "finalbody"):
                for inner in getattr(statement, name, []): self.define(inner, exported)


def public_names(cell):
    "What an exported cell adds to the module's public names."
    for s in cell.body if {"export", "exports"} & cell.directives.keys() else ():
        targets = getattr(s, "targets", [getattr(s, "target", None)])
        names = [n.id for target in targets if target for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        if isinstance(s, (*FUNCTIONS, ast.ClassDef)): names = [s.name]
        patched = isinstance(s, FUNCTIONS) and any(name.startswith("patch") for d in s.decorator_list for name in Uses().ids(d))
        yield from (name for name in names if not name.startswith("_") and not patched)


class Notebook:
    "What a notebook exports, what of it its own assertions reach, and which cells check and show nothing."
    def __init__(self, cells):
        self.public, self.reached, self.problems, self.uses = {}, set(), [], Uses()
        code = [cell for cell in cells if cell.kind == "code" and cell.code.strip()]
        helpers = asserting_functions(ast.Module([s for cell in code for s in cell.body if not cell.exported], []))
        for cell in code:
            for statement in cell.body: self.uses.define(statement, cell.exported)
            for name in public_names(cell): self.public.setdefault(name, cell)
            if cell.exported: pass
            elif cell.directives.get("eval") != "false" and any(asserts(s, helpers) for s in cell.body):
                self.credit(name for s in cell.body for name in self.uses.ids(s))
            elif not cell.outputs and not all(map(only_prepares, cell.body)):
                self.problems.append(f"{cell} neither asserts nor shows a stored output: {cell.code.strip().splitlines()[-1][:60]!r}.")
            self.problems += code_problems(ast.Module(cell.body, []), str(cell))
        front = "\n".join(cell.source for cell in cells if cell.kind == "raw" or cell.number == 1)
        if re.search(r"skip_exec:\s*true", front, re.IGNORECASE): self.problems.append(f"{cells[0].page} has skip_exec, so it is never run.")
        self.module = next((cell.directives["default_exp"] for cell in cells if "default_exp" in cell.directives), "")

    def credit(self, names): self.reached |= self.uses.reach(names)

    def passed_on(self):
        "What other modules export and the checked exports of this notebook use, as (module, name)."
        return {self.uses.origins[name] for name in self.uses.reach(self.public.keys() & self.reached) if name in self.uses.origins}
