"""`agr-ray report`: the page of any job's results."""

from __future__ import annotations

from agr_ray.config import ReportJob
from agr_ray.console import make_console
from agr_ray.errors import ConfigError
from agr_ray.report.comparison_page import comparison_report, is_comparison
from agr_ray.report.evaluation_folder import is_evaluation
from agr_ray.report.evaluation_report import evaluation_report
from agr_ray.report.page import Page
from agr_ray.report.page_files import write_page
from agr_ray.report.scores_report import is_scored, scores_report
from agr_ray.report.sweep_report import is_sweep, sweep_report
from agr_ray.report.training_page import is_training, training_report
from agr_ray.storage import Storage

_KINDS = "an evaluation, a training run, a comparison, a sweep or a scored bucket"


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
        ConfigError: as for `report`.
    """
    uri, others = folders[0], folders[1:]
    if is_evaluation(storage, uri):
        if job.run:
            raise ConfigError(f"report.run {job.run}: {uri} is an evaluation; only a scored bucket has runs")
        return evaluation_report(storage, uri, others, with_faces=job.faces)
    if others:
        raise ConfigError(f"{uri}: several folders need an evaluation first")
    if job.faces:
        raise ConfigError(f"report.faces: {uri} is no evaluation; only evaluations have sheets of faces")
    if is_scored(storage, uri):
        return scores_report(storage, uri, job.run)
    if job.run:
        raise ConfigError(f"report.run {job.run}: {uri} is no scored bucket; only these have runs")
    if is_comparison(storage, uri):
        return comparison_report(storage, uri)
    if is_sweep(storage, uri):
        return sweep_report(storage, uri)
    if is_training(storage, uri):
        return training_report(storage, uri)
    raise ConfigError(f"{uri}: holds neither {_KINDS.replace(' or ', ' nor ')}")
