"""Definitions of the terms on pages, for readers who do not work with such models."""

from __future__ import annotations

from typing import Final

MEASURED: Final = {
    "MAE": "Mean absolute error: by how many years the predicted age is off, on average.",
    "bias": "Mean of predicted age minus true age. Below 0, people are estimated too young.",
    "within 5 years": "Share of images whose predicted age is at most 5 years off.",
    "age group or the next": "Share of images whose predicted age is in the true age group or in one next to it. The "
    "paper calls it one-off accuracy.",
    "balanced accuracy": "Mean of the accuracies of all classes, so that a frequent class counts no more than a rare "
    "one.",
    "AUC": "Probability that the model ranks a random image of a class above a random image of another class. 0.5 is "
    "chance, 1 is perfect.",
    "calibration error": "How far the model's confidence is from its accuracy, on average. A model that is 90 % sure "
    "should be right 9 times in 10.",
    "95 % interval": "If the measurement were repeated on other images of the same kind, 95 % of such intervals would "
    "hold the true value. A wide interval means few images.",
    "baseline": "A model that looks at nothing: it predicts the training labels' median age and most frequent classes "
    "for everyone.",
    "cumulative score": "Share of images whose predicted age is off by no more than so many years.",
    "no face found": "Share of images in which the detector found no face. The middle of the image is used instead.",
    "coverage": "Share of images that an interval holds, or of those on which the model does not abstain.",
    "abstain": "To give no class, because the model is too uncertain.",
    "risk": "Mean error of the predictions that are kept.",
    "challenge age": "The predicted age from which a person passes: the legal age and a buffer.",
    "false-adult rate": "Share of people below the legal age who pass.",
    "false-minor rate": "Share of people of the legal age or older who do not pass.",
    "severity": "Strength of a corruption, from 1 (slight) to 5 (severe).",
}

COUNTED: Final = {
    "perceived": "What the model reads from a picture. It is not a person's identity, origin or true age.",
    "share": "Of the faces that got a class. It repeats the model's mistakes.",
    "corrected share": "Share of all counted faces, estimated with the model's known error rates.",
    "90 % interval": "It would hold the true share for 90 of 100 such buckets, if the model errs here as on its "
    "calibration images.",
    "flagged": "Faces that are not counted: too small, blurred, turned away, or uncertain to be faces.",
    "abstained": "Faces on which the model was too uncertain to tell the class.",
    "rejected": "Images that could not be read, were too large, or were no longer there.",
    "near-duplicates": "Faces of nearly the same picture. They count once in the distinct faces.",
    "stability index": "Population stability index: how far two distributions differ. 0 means that they are equal.",
}

TRAINED: Final = {
    "epoch": "One pass over the training images.",
    "loss": "What training minimises: the weighted sum of the errors in age, gender and race.",
    "objective": "By which the best epoch is chosen on validation images.",
    "validation": "Images on which nothing is trained, by which the best epoch is chosen.",
    "learning rate": "Size of the steps by which training changes the network.",
    "MAE": MEASURED["MAE"],
}
