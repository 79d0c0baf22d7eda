"""Does TensorFlow restore what `vatt convert RUN OUT --to tensorflow` wrote? Run in an environment of TensorFlow 2.7.

    vatt convert tests/interop/tf_checkpoints/vit run --to run --head-dim 6
    vatt convert run ours --to tensorflow
    python benchmarks/prove_tf_checkpoint.py ours tests/interop/tf_checkpoints/vit

The second folder is a genuine checkpoint of the official trainer, with outputs that TensorFlow computed. Its graph of
objects is what the official program has: the same objects are made here, as empty as they are there, and our checkpoint
is restored into them with a Keras optimizer, as official training does, under a distribution strategy. Everything must
find its place, and every value must be the genuine one. A classifier of video or sound is also built out of Keras'
layers with the official attributes, restored as the official evaluation does, and run on the inputs beside it.

It imports nothing of this package, so it runs where TensorFlow does: python -m venv and
pip install tensorflow-cpu==2.7.0 keras==2.7.0 "protobuf<3.21" "numpy<1.24", with Python 3.8 to 3.10.
"""

import os
import sys
from collections import OrderedDict

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import trackable_object_graph_pb2
from tensorflow.python.training.tracking.tracking import AutoTrackable

GRAPH, VALUE = "_CHECKPOINTABLE_OBJECT_GRAPH", "/.ATTRIBUTES/VARIABLE_VALUE"


def latest(folder):
    found = [name[: -len(".index")] for name in os.listdir(folder) if name.endswith(".index")]
    return os.path.join(folder, *found)


def graph_of(reader):
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.ParseFromString(reader.get_tensor(GRAPH))
    return graph


def optimizer_like(reader):
    adam = f"optimizer/beta_1{VALUE}" in reader.get_variable_to_shape_map()
    rate = tf.keras.optimizers.schedules.CosineDecay(0.1, 1000)  # a schedule is saved nowhere, a number would be
    return tf.keras.optimizers.Adam(rate) if adam else tf.keras.optimizers.SGD(rate, momentum=0.5)


def objects_like(reader, optimizer):
    """The objects of a checkpoint's graph, variables zero; returns the model and its variables by key."""
    graph, shapes = graph_of(reader), reader.get_variable_to_shape_map()
    slots = {slot.slot_variable_node_id for node in graph.nodes for slot in node.slot_variables}
    objects, variables = {}, {}
    root = {child.local_name: child.node_id for child in graph.nodes[0].children}
    objects[root["optimizer"]] = optimizer
    for number, node in enumerate(graph.nodes):
        if number in slots or number in objects:
            continue
        if node.attributes:
            key = node.attributes[0].checkpoint_key
            kind = reader.get_variable_to_dtype_map()[key]
            objects[number] = variables[key] = tf.Variable(tf.zeros(shapes[key], kind), name="v")
        else:
            objects[number] = AutoTrackable()
    for number, node in enumerate(graph.nodes):
        if number and type(objects.get(number)) is AutoTrackable:
            for child in node.children:
                # Names such as "0" or "axis" are no attributes; tracking by name is what TensorFlow itself does.
                objects[number]._track_trackable(objects[child.node_id], child.local_name, overwrite=True)
    return objects[root["model"]], variables


def prove_objects(ours, genuine):
    """Restore ours into the objects of the genuine program; every value and every slot must be the genuine one."""
    theirs, written = tf.train.load_checkpoint(genuine), tf.train.load_checkpoint(ours)
    assert written.get_variable_to_shape_map().keys() == theirs.get_variable_to_shape_map().keys()
    with tf.distribute.MirroredStrategy(["/cpu:0"]).scope():
        optimizer = optimizer_like(theirs)
        model, variables = objects_like(theirs, optimizer)
        slots = graph_of(theirs)
        keys = {number: node.attributes[0].checkpoint_key for number, node in enumerate(slots.nodes) if node.attributes}
        references = [slot for node in slots.nodes for slot in node.slot_variables]
        trained = list(dict.fromkeys(keys[slot.original_variable_node_id] for slot in references))
        optimizer._create_all_weights([variables[key] for key in trained])
        checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
        status = checkpoint.restore(ours)
        status.assert_existing_objects_matched()
        status.assert_consumed()
    for key, variable in variables.items():
        if not key.startswith(("optimizer/", "save_counter")):
            np.testing.assert_array_equal(variable.numpy(), theirs.get_tensor(key))
    for slot in references:
        value = optimizer.get_slot(variables[keys[slot.original_variable_node_id]], slot.slot_name)
        np.testing.assert_array_equal(value.numpy(), theirs.get_tensor(keys[slot.slot_variable_node_id]))
    assert optimizer.iterations.numpy() == theirs.get_tensor(f"optimizer/iter{VALUE}")
    print(f"restored: {len(variables)} variables, {len(references)} slots, step {optimizer.iterations.numpy()}")


# ------------------------------------------------------------------------------------------------ one that runs


def dense(width, **more):
    return tf.keras.layers.Dense(width, **more)


class Attention(tf.keras.layers.Layer):
    def __init__(self, dim, heads, head_dim):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.q, self.k, self.v = (dense(heads * head_dim) for _ in range(3))
        self.o, self.dropout = dense(dim), tf.keras.layers.Dropout(0.1)

    def call(self, x, training=False):
        def split(y):
            return tf.transpose(tf.reshape(y, [tf.shape(y)[0], -1, self.heads, self.head_dim]), [0, 2, 1, 3])

        scores = tf.matmul(split(self.q(x)), split(self.k(x)), transpose_b=True) / self.head_dim**0.5
        mixed = tf.matmul(self.dropout(tf.nn.softmax(scores), training=training), split(self.v(x)))
        return self.o(tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [tf.shape(x)[0], -1, self.heads * self.head_dim]))


class Hidden(tf.keras.layers.Layer):
    def __init__(self, dim, ff_dim):
        super().__init__()
        self.wi, self.wo, self.dropout = dense(ff_dim), dense(dim), tf.keras.layers.Dropout(0.1)

    def call(self, x, training=False):
        return self.wo(self.dropout(tf.keras.activations.gelu(self.wi(x)), training=training))


class FeedForward(tf.keras.layers.Layer):
    def __init__(self, dim, ff_dim):
        super().__init__()
        self.mlp = Hidden(dim, ff_dim)
        self.layer_norm = tf.keras.layers.LayerNormalization(epsilon=1e-6)
        self.dropout = tf.keras.layers.Dropout(0.1)

    def call(self, x, training=False):
        return x + self.dropout(self.mlp(self.layer_norm(x), training=training), training=training)


class Block(tf.keras.layers.Layer):
    def __init__(self, dim, ff_dim, heads, head_dim):
        super().__init__()
        self.layer_norm = tf.keras.layers.LayerNormalization(epsilon=1e-6)
        self.mha, self.dropout = Attention(dim, heads, head_dim), tf.keras.layers.Dropout(0.1)
        self.feed_forward = FeedForward(dim, ff_dim)

    def call(self, x, training=False):
        x = x + self.dropout(self.mha(self.layer_norm(x), training=training), training=training)
        return self.feed_forward(x, training=training)


class Encoder(tf.keras.layers.Layer):
    def __init__(self, layers, *sizes):
        super().__init__()
        self.layers = [Block(*sizes) for _ in range(layers)]
        self.final_layer_norm = tf.keras.layers.LayerNormalization(epsilon=1e-6)
        self.dropout = tf.keras.layers.Dropout(0.1)

    def call(self, x, training=False):
        for layer in self.layers:
            x = layer(x, training=training)
        return self.dropout(self.final_layer_norm(x), training=training)


class Positions(tf.keras.layers.Layer):
    def __init__(self, grid, dim):
        super().__init__()
        self.grid = tuple(grid)
        for axis, size in zip(("temporal", "vertical", "horizontal"), grid):
            setattr(self, axis + "_position_embeddings", tf.keras.layers.Embedding(size, dim))
        self.layernorm = tf.keras.layers.LayerNormalization(epsilon=1e-6)
        self.dropout = tf.keras.layers.Dropout(0.1)

    def call(self, x, training=False):
        places = np.indices(self.grid).reshape(len(self.grid), -1)
        names = ("temporal", "vertical", "horizontal")[: len(self.grid)]
        total = sum(getattr(self, f"{name}_position_embeddings")(places[axis]) for axis, name in enumerate(names))
        return self.dropout(x + self.layernorm(total), training=training)


class Tower(tf.keras.layers.Layer):
    def __init__(self, size, head_dim):
        super().__init__()
        video = "voxel_to_patch/kernel" in size
        kernel = size["voxel_to_patch/kernel" if video else "wave_to_patch/kernel"]
        self.dim = kernel[-1]
        convolution = (tf.keras.layers.Conv3D if video else tf.keras.layers.Conv1D)(
            self.dim, kernel[:-2], strides=kernel[:-2], padding="valid"
        )
        setattr(self, "voxel_to_patch" if video else "wave_to_patch", convolution)
        self.patches = convolution
        if "pre_proj/kernel" in size:
            self.pre_proj = dense(self.dim, activation="gelu")
        tables = [
            f"pos_embedding_lookup/{axis}_position_embeddings/embeddings"
            for axis in ("temporal", "vertical", "horizontal")
        ]
        self.pos_embedding_lookup = Positions([size[table][0] for table in tables if table in size], self.dim)
        layers = len({name.split("/")[2] for name in size if name.startswith("tx/layers/")})
        ff_dim = size["tx/layers/0/feed_forward/mlp/wi/kernel"][1]
        heads = size["tx/layers/0/mha/q/kernel"][1] // head_dim
        self.tx = Encoder(layers, self.dim, ff_dim, heads, head_dim)
        if "post_proj/kernel" in size:
            self.post_proj = dense(size["post_proj/kernel"][1], activation="gelu")

    def build(self, _):
        self.agg_token_embd = self.add_weight("agg_embedding", shape=(self.dim,))

    def call(self, x, training=False):
        x = self.patches(x)
        x = tf.reshape(x, [tf.shape(x)[0], -1, self.dim])
        x = self.pre_proj(x) if hasattr(self, "pre_proj") else x
        x = self.pos_embedding_lookup(x, training=training)
        first = tf.tile(self.agg_token_embd[None, None], [tf.shape(x)[0], 1, 1])
        x = self.tx(tf.concat([first, x], 1), training=training)
        return (self.post_proj(x) if hasattr(self, "post_proj") else x)[:, 0]


class Classifier(tf.keras.Model):
    def __init__(self, size, classes, head_dim):
        super().__init__()
        self._ops = OrderedDict(dropout=tf.keras.layers.Dropout(0.5), cls=dense(classes))
        self._base = Tower(size, head_dim)
        self.pred_aggregator = tf.keras.layers.Layer()

    def call(self, x, training=None):
        x = self._ops["dropout"](self._base(x, training=training), training=training)
        return self.pred_aggregator(self._ops["cls"](x))


def prove_outputs(ours, expected, head_dim):
    """Restore ours into a Keras classifier as the official evaluation does, and run it on the inputs beside it."""
    reader, root = tf.train.load_checkpoint(ours), "model/layer_with_weights-0/_base/"
    shapes = reader.get_variable_to_shape_map()
    size = {key[len(root) : -len(VALUE)]: shape for key, shape in shapes.items() if key.startswith(root)}
    classes = shapes[f"model/layer_with_weights-0/_ops/cls/bias{VALUE}"][0]
    archive = np.load(expected)
    (x,) = [archive[key] for key in archive if key.startswith("in/")]
    x = x if x.ndim == 5 else x.reshape(len(x), -1, 1)
    with tf.distribute.MirroredStrategy(["/cpu:0"]).scope():
        inputs = tf.keras.Input(shape=x.shape[1:])
        model = tf.keras.Model(inputs=inputs, outputs=Classifier(size, classes, head_dim)(inputs))
        model.optimizer = optimizer_like(reader)
        status = tf.train.Checkpoint(model=model).restore(ours).expect_partial()
        status.assert_existing_objects_matched()
    error = np.abs(model(x, training=False).numpy() - archive["out/logits"]).max()
    print(f"logits of a Keras model restored from ours: worst error {error:.2g}")
    assert error <= 2e-6


def main(ours, genuine):
    names = [name for name in os.listdir(genuine) if name == "expected.npz"]
    prefix, like = latest(ours), latest(genuine)
    print(f"TensorFlow {tf.__version__}: {prefix}, like {like}")
    prove_objects(prefix, like)
    head_dims = {"vit": 6, "wat": 8}
    kind = os.path.basename(os.path.normpath(genuine))
    if names and kind in head_dims:
        prove_outputs(prefix, os.path.join(genuine, names[0]), head_dims[kind])


if __name__ == "__main__":
    main(*sys.argv[1:])
