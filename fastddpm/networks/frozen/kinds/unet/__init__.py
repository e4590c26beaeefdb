"""`fastddpm.UNet`, frozen: its properties (`blueprint`), its folds (`folding`) and its layers in order (`lowering`)."""
