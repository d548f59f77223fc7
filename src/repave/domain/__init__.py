"""Pure rules: stdlib only, no network, disk or clock."""
