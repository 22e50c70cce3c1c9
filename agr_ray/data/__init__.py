"""From labelled sources to prepared sets: listing, labels, manifest, splits and crops."""
