"""An export on the hub, or on another that HF_ENDPOINT names."""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from nanochat.data.hub import check_connection, endpoint
from nanochat.errors import UserError, masked


def push(folder: Path, repo: str, *, private: bool = True, dry_run: bool = True) -> None:
    """Send all files of `folder` to the model repository `repo` (OWNER/NAME), which is made where there is none. With
    dry_run only say so. Raises UserError for no token in HF_TOKEN, and for what the hub refuses."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no export: it has no config.json; remove it and export again")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--push={repo}: expected OWNER/NAME")
    where = f"{masked(endpoint())}/{repo}"
    for path in files:
        print(f"{path.stat().st_size / 1e6:10,.1f} MB  {path.relative_to(folder)}")
    if dry_run:
        print(f"{size / 1e6:10,.1f} MB would go to {where}; add --no-dry-run to send them", flush=True)
        return
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise UserError("HF_TOKEN is not set: put a token of the hub with the right to write into it")
    check_connection()
    api = HfApi(endpoint=endpoint(), token=token)
    try:
        if not api.repo_exists(repo):
            api.create_repo(repo, private=private)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of nanochat")
    except (OfflineModeIsEnabled, HFValidationError) as error:
        raise UserError(f"--push={repo}: {' '.join(str(error).split())}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "check HF_TOKEN and its rights" if status in (401, 403) else "try again later"
        raise UserError(f"{where} was refused: HTTP {status}; {hint}") from None
    except HTTPError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"could not send to {where} ({reason}): check the network and HF_ENDPOINT") from None
    print(f"{size / 1e6:10,.1f} MB sent to {where}", flush=True)
