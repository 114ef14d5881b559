"""The fully-convolutional network of section 3.2: the classifier at every place of an image that need not be square."""

from torch import Tensor, nn

from model.vgg import STRIDE, VGG


class Dense(nn.Module):
    """A network run densely over whole images, with the parameters of the VGG that it is given: nothing is copied.

    FC6 becomes a convolution over the last feature map (7×7 at a crop of 224 pixels, (crop/32)² otherwise), FC7 and FC8 become
    1×1 convolutions. That is the classifier of the crop at every window of the map; windows are 32 pixels of the image apart,
    and zeros surround the image alone, not each of them as they do a crop. The poolings round down: rows and columns beyond
    the last multiple of 32 get no place of their own in the map.

    FC6 is computed as VGG's own, a matrix product, of all windows. A convolution in channels_last would first bring its weight
    of 100 million into another layout, on every call. In float32 a window is 100 kB at 224 pixels; all windows of an image are
    less than its first feature map.
    """

    def __init__(self, model: VGG) -> None:
        super().__init__()
        self.model = model
        self._side = model.crop // STRIDE  # of a window, in places of the last feature map

    def forward(self, images: Tensor) -> Tensor:
        """The class score map averaged over space (section 3.2).

        images: [n, 3, height, width], both at least the crop; floating, the mean subtracted. Returns logits [n, classes].
        Raises ValueError as features does.
        """
        # The mean of the last layer's scores is its score of the mean: it is computed for one place, not for all.
        return self.model.classifier[-1](self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The activations of the penultimate layer, after its ReLU, averaged over space (appendix B).

        images: as forward takes them. Returns [n, 4096]. Raises ValueError for images smaller than the crop.
        """
        height, width = images.shape[-2:]
        if min(height, width) < self.model.crop:
            raise ValueError(f"images of {width}×{height} pixels are smaller than the crop, {self.model.crop}")
        maps = self.model.features(images)
        # → [n, 512, places down, places across, side, side] → [n, places down, places across, 512·side²], as FC6 takes them.
        windows = maps.unfold(2, self._side, 1).unfold(3, self._side, 1)
        windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)
        return self.model.classifier[:-1](windows).mean(dim=(1, 2))
