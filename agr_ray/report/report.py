"""`agr-ray report`: the page of any job's results."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Final

from agr_ray.config import ReportJob
from agr_ray.console import make_console
from agr_ray.errors import ConfigError
from agr_ray.report.evaluation_folder import is_evaluation
from agr_ray.report.page import Page
from agr_ray.report.page_files import write_page
from agr_ray.scoring.publish import SUCCESS
from agr_ray.storage import Storage

_MARKERS: Final = {
    "comparison.parquet": "comparison_page:comparison_report",
    "cross-validation.json": "cross_validation_page:cross_validation_report",
    "sweep.json": "sweep_report:sweep_report",
    "history.parquet": "training_page:training_report",
}
"""A file of each kind of results, and the function of this package that makes its page."""


def report(job: ReportJob, *, quiet: bool = False) -> str:
    """Write the page of a folder of results, print its path, and return the URI of report.html.

    Args:
        job: which results.
        quiet: print nothing.

    Raises:
        ConfigError: the folder holds no results, or an option does not apply to them.
    """
    storage, console = Storage.from_config(job.storage), make_console(quiet=quiet)
    folders = []
    for folder in job.folders:
        storage.probe(folder, "report.folders")
        folders.append(storage.absolute(folder).rstrip("/"))
        if not storage.exists(folders[-1]):
            raise ConfigError(f"report.folders {folder}: there is no such folder")
    out = storage.absolute(job.out).rstrip("/") if job.out else folders[0]
    storage.probe(out, "report.out", write=True)
    page = report_page(job, storage, folders)
    uri = write_page(storage, out, page)
    console.print(uri)
    return uri


def report_page(job: ReportJob, storage: Storage, folders: list[str]) -> Page:
    """Return the page of the first folder's results.

    Raises:
        ConfigError: as for `report`, or a file of the results is damaged.
    """
    uri, others = folders[0], folders[1:]
    try:
        return _page(job, storage, uri, others)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{uri}: a file is damaged, or was written by another version of agr_ray ({type(error).__name__}: {error})"
        ) from error


def _page(job: ReportJob, storage: Storage, uri: str, others: list[str]) -> Page:
    """Recognise the results, and import only what their page needs."""
    if is_evaluation(storage, uri):
        if job.run:
            raise ConfigError(f"report.run {job.run}: {uri} is an evaluation; only scoring results have runs")
        from agr_ray.report.evaluation_report import evaluation_report

        return evaluation_report(storage, uri, others, with_faces=job.faces)
    if others:
        raise ConfigError(f"report.folders: several folders are allowed only for evaluations, and {uri} is not one")
    if job.faces:
        raise ConfigError(f"report.faces: {uri} is not an evaluation; only evaluations have sheets of faces")
    if storage.exists(storage.join(uri, SUCCESS)):
        from agr_ray.report.scores_report import scores_report

        return scores_report(storage, uri, job.run)
    if job.run:
        raise ConfigError(f"report.run {job.run}: {uri} does not hold scoring results; only these have runs")
    for marker, module in _MARKERS.items():
        if storage.exists(storage.join(uri, marker)):
            page: Page = resolve_name(f"agr_ray.report.{module}")(storage, uri)
            return page
    raise ConfigError(
        f"{uri}: holds no results of evaluate, train, compare, cross-validate, tune or score; give the folder that one "
        "of them wrote, not a checkpoint or photographs"
    )
