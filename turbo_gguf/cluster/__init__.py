"""Cases on several machines: Ray (``pool``), what runs on a node (``node``), and the driver's side (``runner``)."""
