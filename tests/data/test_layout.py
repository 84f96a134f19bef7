"""PAGE and ALTO files give the paragraphs that a person marked."""

import cv2
import numpy as np
import pytest
from PIL import Image

from paragraph_ocr.data import layout
from paragraph_ocr.data.folder import FolderCorpus
from paragraph_ocr.data.layout import Region
from paragraph_ocr.data.store import Store
from paragraph_ocr.errors import UserError

PAGE = """<?xml version="1.0" encoding="UTF-8"?>
<PcGts xmlns="http://schema.primaresearch.org/PAGE/gts/pagecontent/{version}">
 <Page imageFilename="scan.png" imageWidth="200" imageHeight="300">
  <TextRegion id="r1"><Coords points="10,20 110,20 110,80 10,80"/>
   <TextLine id="l1"><Coords points="10,20 110,20 110,50 10,50"/>
    <TextEquiv index="1"><Unicode>worse</Unicode></TextEquiv>
    <TextEquiv index="0"><Unicode>first &amp; line</Unicode></TextEquiv></TextLine>
   <TextLine id="l2"><Coords points="10,50 110,50 110,80 10,80"/>
    <TextEquiv><Unicode>second</Unicode></TextEquiv></TextLine>
  </TextRegion>
  <TextRegion id="r2"><Coords points="10,100 110,100 60,200"/>
   <TextEquiv><Unicode>as a whole</Unicode></TextEquiv></TextRegion>
  <TextRegion id="empty"><Coords points="0,0 1,0 1,1"/></TextRegion>
  <ImageRegion id="r3"><Coords points="0,0 1,0 1,1"/></ImageRegion>
 </Page>
</PcGts>"""

DATED = PAGE.replace("{version}", "2019-07-15")

ALTO = """<?xml version="1.0" encoding="UTF-8"?>
<alto xmlns="http://www.loc.gov/standards/alto/{version}#">
 <Description><MeasurementUnit>pixel</MeasurementUnit>
  <sourceImageInformation><fileName>scan.png</fileName></sourceImageInformation></Description>
 <Layout><Page ID="p"><PrintSpace>
  <TextBlock ID="b1" HPOS="10" VPOS="20" WIDTH="100" HEIGHT="60">
   <TextLine><String CONTENT="first"/><SP/><String CONTENT="&amp;"/><SP/><String CONTENT="line"/></TextLine>
   <TextLine><String CONTENT="sec"/><HYP CONTENT="-"/></TextLine>
  </TextBlock>
  <TextBlock ID="b2" HPOS="0" VPOS="0" WIDTH="1" HEIGHT="1">
   <Shape><Polygon POINTS="10,100 110,100 60,200"/></Shape>
   <TextLine><String CONTENT="no"/><String CONTENT="blanks"/></TextLine>
  </TextBlock>
 </PrintSpace></Page></Layout>
</alto>"""

BOX = ((10, 20), (110, 20), (110, 80), (10, 80))
TRIANGLE = ((10, 100), (110, 100), (60, 200))


def read(path):
    return layout.read_layout(path, path.read_bytes())


def written(tmp_path, text, name="layout.xml"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


@pytest.mark.parametrize("version", ["2013-07-15", "2019-07-15"])
def test_page_regions_are_read_exactly(tmp_path, version):
    assert read(written(tmp_path, PAGE.replace("{version}", version))) == [
        Region("scan.png", "r1", "first & line\nsecond", BOX),
        Region("scan.png", "r2", "as a whole", TRIANGLE),
    ]


@pytest.mark.parametrize("version", ["ns-v2", "ns-v4"])
def test_alto_blocks_are_read_exactly(tmp_path, version):
    assert read(written(tmp_path, ALTO.replace("{version}", version))) == [
        Region("scan.png", "b1", "first & line\nsec-", BOX),
        Region("scan.png", "b2", "no blanks", TRIANGLE),
    ]


@pytest.mark.parametrize("folder", ["", "page"])
@pytest.mark.parametrize("layout", [PAGE, ALTO])
def test_a_folder_of_layout_files_gives_the_ink_inside_each_region(tmp_path, folder, layout):
    mine = tmp_path / "mine"
    (mine / folder).mkdir(parents=True, exist_ok=True)
    scan = np.full((300, 200), 255, np.uint8)
    cv2.putText(scan, "inside", (20, 60), cv2.FONT_HERSHEY_SIMPLEX, 0.7, 0, 2)
    cv2.circle(scan, (60, 130), 6, 0, -1)  # in the triangle
    cv2.circle(scan, (18, 190), 6, 0, -1)  # in its bounds, not in it
    cv2.circle(scan, (160, 250), 6, 0, -1)  # elsewhere
    Image.fromarray(scan).save(mine / "scan.png")
    written(mine / folder, layout.replace("{version}", "2019-07-15"))
    corpus = FolderCorpus(name="mine", folder=mine, height=128, width=128, split="test")
    store = Store(corpus.prepare(tmp_path / "stores", num_workers=0))
    assert [source.split("#")[0] for source in store.sources] == ["scan.png"] * 2
    assert store.sizes.tolist() == [[61, 101], [101, 101]]
    assert store.image(0).max() > 200
    triangle = store.image(1)
    assert triangle[30, 50] > 200
    assert triangle[80:, :20].max() == 0


BOMB = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;">]><PcGts>&y;</PcGts>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><PcGts>&x;</PcGts>'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<PcGts><Page></PcGts>", "broken XML"),
        ("", "broken XML"),
        ("<html/>", "neither PAGE XML nor ALTO"),
        (BOMB, "DTD or entities"),
        (OUTSIDE, "DTD or entities"),
        ("<alto><Layout/></alto>", "no fileName"),
        (DATED.replace('points="10,20 110,20 110,80 10,80"', 'points="10,20"'), "no polygon"),
        (DATED.replace('imageFilename="scan.png"', ""), "imageFilename"),
    ],
)
def test_what_is_no_layout_is_one_line(tmp_path, text, said):
    with pytest.raises(UserError, match=said) as refusal:
        read(written(tmp_path, text))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "missing.png"])
def test_a_layout_file_leads_to_no_scan_outside_the_folder(tmp_path, name):
    mine = tmp_path / "mine"
    mine.mkdir()
    Image.new("L", (200, 300), 255).save(tmp_path / "secret.png")
    written(mine, DATED.replace("scan.png", name))
    corpus = FolderCorpus(name="mine", folder=mine, height=128, width=128)
    with pytest.raises(UserError, match="outside the folder|does not exist"):
        corpus.prepare(tmp_path / "stores", num_workers=0)
    assert not (tmp_path / "stores").exists()
