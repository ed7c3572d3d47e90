import fcntl
from pathlib import Path

from util.errors import UserError

EARLY, CLEARLY = 20, 4  # stop early when so many are bad, and so many times the allowed share of those tried


class BadImages:
    """Counts and names the images that cannot be decoded, over all processes, and stops the run when they are too many.

    path: the file that names each of them once, one a line. total: images of the run. limit: share that may be bad.
    """

    def __init__(self, path: Path, total: int, limit: float = 0.01):
        self.path, self.total, self.limit = Path(path), total, limit
        self.tried = 0
        self.names = self.path.read_text().splitlines() if self.path.exists() else []
        self.before = len(self.names)

    def add(self, tried: int, found: list[tuple[str, str]]) -> None:
        """Note how many images all processes tried, and which of them this one found bad, as (path, reason)."""
        self.tried += tried
        if not found:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # other processes of the run name theirs in the same file
            file.seek(0)
            known = file.read().splitlines()
            new = [path for path in dict.fromkeys(path for path, _ in found) if path not in set(known)]
            file.writelines(f"{path}\n" for path in new)
        self.names = known + new
        count = len(self.names)
        allowed = max(self.limit * self.total, 1 if self.limit else 0)  # 1 % of a small folder is less than one image
        if count > allowed or count - self.before > max(EARLY, CLEARLY * self.limit * self.tried):
            raise UserError(
                f"{count:,} of {self.total:,} images cannot be read, data.max_bad allows {self.limit:.4g} of them: "
                f"{', '.join(self.names[:3])}{', ...' if count > 3 else ''} ({found[0][1]}); "
                f"all are named in {self.path}: mend or remove them, then delete that file"
            )
