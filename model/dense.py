"""The fully-convolutional network of section 3.2: the classifier at every place of an image that need not be square."""

from torch import Tensor, nn

from model.vgg import STRIDE, VGG


class Dense(nn.Module):
    """A network run densely over whole images, with the parameters of the VGG that it is given: nothing is copied.

    FC6 as a convolution over the last feature map (7×7 at a crop of 224 pixels, (crop/32)² otherwise), FC7 and FC8 as 1×1
    convolutions: the crop's classifier at every window of the map, which are 32 pixels apart. Unlike the crop's borders, the
    windows' are not padded with zeros, except at the image's own.

    The convolution is computed as a matrix product of the windows, as the VGG's own: so FC6's weight, three quarters of all,
    keeps its layout, which a convolution in channels_last would change on every call. The windows take 100 kB each in
    float32 at 224 pixels, less than the first feature maps of the same image do.

    Rows and columns of the image that do not fill a multiple of 32 pixels are dropped by the poolings, at the right and at
    the bottom.
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
        windows = maps.unfold(2, self._side, 1).unfold(
            3, self._side, 1
        )  # [n, 512, places down, places across, side, side]
        places = windows.permute(0, 2, 3, 1, 4, 5).flatten(
            3
        )  # [n, places down, places across, 512·side²], as FC6 takes it
        return self.model.classifier[:-1](places).mean(dim=(1, 2))
