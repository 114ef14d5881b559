"""What profile/roofline.py prints for people."""

from perf.all_reduce import Links
from perf.floor import Job


def print_layers(result: dict) -> None:
    peak = result["peaks"]
    ridge = peak["flops_per_second"] / peak["bytes_per_second"]
    print(f"{'layer':18}{'kind':8}{'GFLOP':>12}{'MB':>12}{'FLOP/byte':>12}{'floor, ms':>12}  limit")
    for layer in result["layers"]:
        intensity = layer["flops"] / layer["bytes"]
        print(
            f"{layer['name']:18}{layer['kind']:8}{layer['flops'] / 1e9:12,.2f}{layer['bytes'] / 1e6:12,.1f}"
            f"{intensity:12,.1f}{1e3 * layer['floor_seconds']:12.3f}  {'compute' if intensity > ridge else 'memory'}"
        )
    print()


def print_floor(job: Job, result: dict) -> None:
    peak, floor, decode = result["peaks"], result["floor_seconds"], result["decode"]
    rate = job.ranks * job.batch / floor["total"]
    print(
        f"{job.arch}, {job.classes} classes, crop {job.crop}, batch {job.batch}"
        f"{f' in passes of {job.micro_batch}' if job.passes > 1 else ''}, {job.precision}, {job.ranks} × {peak['name']}: "
        f"{peak['flops_per_second'] / 1e12:,.3g} TFLOP/s, {peak['bytes_per_second'] / 1e9:,.4g} GB/s ({peak['source']})"
    )
    print(f"{result['flops_per_image'] / 1e9:,.2f} GFLOP a training image\n")
    power = f", {rate / job.ranks / peak['watts']:,.3g} images/joule at {peak['watts']:,} W" if peak["watts"] else ""
    print(f"{'floor of a step':18}{'ms':>12}")
    for part in ("forward", "backward", "optimizer", "all_reduce", "total"):
        note = {
            "optimizer": f"  {result['optimizer_bytes'] / 1e6:,.0f} MB",
            "all_reduce": f"  {result['all_reduce_bytes'] / 1e6:,.0f} MB, beside the backward pass",
            "total": f"  at most {rate:,.0f} images/s{power}",
        }.get(part, "")
        print(f"{part.replace('_', '-'):18}{1e3 * floor[part]:12.3f}{note}")
    if result["mfu"] is not None:
        print(f"{'MFU':18}{100 * result['mfu']:11.1f}%")
    if result["images_per_joule"] is not None:
        print(f"{'images/joule':18}{result['images_per_joule']:12.3f}")
    if decode["pixels_per_image"] is not None:
        pixels = decode["pixels_per_image"]
        print(
            f"{'to decode':18}{pixels / 1e3:12,.1f} thousand pixels an image, {pixels * rate / 1e6:,.0f} million a second"
        )
    if decode["jpeg_bytes_per_image"] is not None:
        size = decode["jpeg_bytes_per_image"]
        print(f"{'to read':18}{size / 1e3:12,.1f} kB an image, {size * rate / 1e6:,.0f} MB a second")
    print()


def print_scaling(result: dict, links: Links, algorithm: str) -> None:
    print(
        f"Predicted from the {'measured step' if result['scaling_from'] == 'measured' else 'floor'}, the same batch on each "
        f"GPU; all-reduce: {algorithm}; {links.gpus_per_node} GPUs a machine at "
        f"{links.peer_bytes_per_second / 1e9:,.4g} GB/s, machines at {8 * links.network_bytes_per_second / 1e9:,.4g} Gbit/s, "
        f"{1e6 * links.latency_seconds:,.3g} µs. Images/s:"
    )
    print(f"{'':6}{'all-reduce beside the backward pass':>48}{'after it':>28}")
    print(f"{'GPUs':>6}{'float32':>14}{'of linear':>10}{'16 bits':>14}{'of linear':>10}{'float32':>14}{'16 bits':>14}")
    for row in result["scaling"]:
        print(
            f"{row['ranks']:6}{row['images_per_second']:14,.0f}{100 * row['efficiency']:9.1f}%"
            f"{row['images_per_second_compressed']:14,.0f}{100 * row['efficiency_compressed']:9.1f}%"
            f"{row['images_per_second_without_overlap']:14,.0f}{row['images_per_second_compressed_without_overlap']:14,.0f}"
        )
