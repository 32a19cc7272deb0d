"""What .gitconfig has git do with notebooks: `clean` what is added (stdin to stdout), `merge` two branches cell by cell."""
import json
import sys


def clean(text):
    "A notebook as nbdev_clean would leave it; anything that is not one (a half-merged file, say) stays as it is."
    try: json.loads(text)
    except ValueError: return text
    from execnb.nbio import loads, nb2str
    from nbdev.clean import _nbdev_clean
    _nbdev_clean(notebook := loads(text))
    return nb2str(notebook)


def merge(base, ours, theirs, path):
    "Merge into the file `ours`; whether a conflict is left, which is marked in cells of its own."
    from nbdev.merge import nbdev_merge
    return bool(nbdev_merge.__wrapped__(base, ours, theirs, path))


if __name__ == "__main__":
    if sys.argv[1:] == ["clean"]: sys.stdout.buffer.write(clean(sys.stdin.buffer.read().decode()).encode())
    elif sys.argv[1:2] == ["merge"] and len(sys.argv) == 6: sys.exit(merge(*sys.argv[2:]))
    else: sys.exit("usage: git_notebooks.py clean | merge BASE OURS THEIRS PATH")
