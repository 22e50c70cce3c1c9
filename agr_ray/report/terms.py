"""Definitions of the terms on pages, for readers who do not work with such models."""

from __future__ import annotations

from typing import Final

MEASURED: Final = {
    "MAE": "Mean absolute error: by how many years the predicted age is off, on average.",
    "bias": "Mean of predicted age minus true age. Below 0, people are estimated too young, on average.",
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
    "baseline": "Constant baseline: ignores the image, and predicts the training labels' median age and most frequent "
    "classes for everyone.",
    "cumulative score": "Share of images whose predicted age is off by no more than so many years.",
    "no face found": "Share of images in which the detector found no face. The centre of the image is used instead.",
    "coverage": "Of intervals: fraction of images whose true age lies in the predicted interval. Of abstention: "
    "fraction of images on which the model does not abstain.",
    "abstains": "Gives no class, because the model is too uncertain.",
    "confidence": "The model's probability of the class that it predicts.",
    "overconfident": "More confident than accurate.",
    "calibrated": "Adjusted on labelled images, so that age intervals hold the true age as often as promised, and "
    "probabilities match how often they are right.",
    "risk": "Mean error of the predictions that are kept.",
    "cells": "The groups of the same true gender, race and age group.",
    "yaw": "How far the head is turned to the left or right, in degrees.",
    "fallback": "Images in which no face was found. Their centre is used instead.",
    "challenge age": "The predicted age from which a person passes: the legal age and a buffer.",
    "false-adult rate": "Share of people below the legal age who pass.",
    "false-minor rate": "Share of people of the legal age or older who do not pass.",
    "severity": "Strength of a corruption, from 1 (slight) to 5 (severe).",
}

COUNTED: Final = {
    "perceived": "What the model reads from a picture. It is not a person's identity, origin or true age.",
    "counted faces": "All detected faces that are not flagged, with or without a predicted class.",
    "undecided": "The model abstained: it gives no class, because it is too uncertain.",
    "corrected share": "Fraction of all counted faces, estimated with the model's error rates on its calibration "
    "images.",
    "calibration images": "Labelled images on which the model's error rates and age intervals were measured.",
    "90 % interval": "Contains the true share in 90 of 100 such collections, provided that the model's error rates "
    "match those on its calibration images.",
    "flagged": "Faces that are not counted: too small, blurred, turned away, or not clearly faces.",
    "detector score": "How sure the detector is that this is a face.",
    "sharpness": "Variance of the Laplacian of the aligned face. A blurred face has a low value.",
    "yaw": "How far the head is turned to the left or right.",
    "pitch": "How far the head is raised or lowered.",
    "rejected": "Images that could not be read, were too large, or were no longer there.",
    "near-duplicates": "Faces of nearly the same picture. They count once in the distinct faces.",
    "stability index": "Population stability index: how far two distributions differ. 0 means that they are equal.",
}

TRAINED: Final = {
    "epoch": "One pass over the training images.",
    "loss": "What training minimises: the weighted sum of the task losses.",
    "objective": "Mean over the tasks of the error divided by the constant baseline's error. The epoch with the lowest "
    "value is the best.",
    "validation": "Images on which nothing is trained, by which the best epoch is chosen.",
    "learning rate": "Size of the steps by which training changes the network.",
    "MAE": MEASURED["MAE"],
}
