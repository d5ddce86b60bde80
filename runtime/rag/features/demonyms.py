"""The words for who or what comes from a place, as the place: "a Mexican politician" leads to Mexico.

"The country that the composer comes from" is answered by a passage that says "Austrian" and by one that says
"Austria", and no stemmer joins the two; so the words are a table: English adjectives and names of peoples,
folded, and the place's name in one word. Words that mostly mean something else are not in it ("pole"), nor
are those of two places ("Dominican").
"""

from __future__ import annotations

_PLACES = """
afghanistan: afghan
africa: african
alaska: alaskan
albania: albanian
algeria: algerian
america: american
andorra: andorran
angola: angolan
argentina: argentine argentinian argentinean
armenia: armenian
asia: asian
australia: australian
austria: austrian
azerbaijan: azerbaijani azeri
bahamas: bahamian
bahrain: bahraini
bangladesh: bangladeshi
barbados: barbadian bajan
bavaria: bavarian
belarus: belarusian belarusan byelorussian
belgium: belgian
belize: belizean
benin: beninese
bermuda: bermudian bermudan
bhutan: bhutanese
bolivia: bolivian
bosnia: bosnian
botswana: botswanan motswana
brazil: brazilian
britain: british briton
brittany: breton
brunei: bruneian
bulgaria: bulgarian
burma: burmese
burundi: burundian
byzantium: byzantine
california: californian
cambodia: cambodian khmer
cameroon: cameroonian
canada: canadian
catalonia: catalan catalonian
chad: chadian
chile: chilean
china: chinese
colombia: colombian
congo: congolese
cornwall: cornish
corsica: corsican
crete: cretan
croatia: croatian croat
cuba: cuban
cyprus: cypriot
denmark: danish
ecuador: ecuadorian ecuadorean
egypt: egyptian
england: english englishman englishwoman englishmen
eritrea: eritrean
estonia: estonian
ethiopia: ethiopian
europe: european
fiji: fijian
finland: finnish
flanders: flemish
florida: floridian
france: french frenchman frenchwoman frenchmen
gabon: gabonese
galicia: galician
gambia: gambian
georgia: georgian
germany: german
ghana: ghanaian
gibraltar: gibraltarian
greece: greek
greenland: greenlandic greenlander
guatemala: guatemalan
guinea: guinean
guyana: guyanese
haiti: haitian
hawaii: hawaiian
honduras: honduran
hungary: hungarian magyar
iceland: icelandic icelander
india: indian
indonesia: indonesian
iran: iranian
iraq: iraqi
ireland: irish irishman irishwoman irishmen
israel: israeli
italy: italian
jamaica: jamaican
japan: japanese
jordan: jordanian
kazakhstan: kazakh kazakhstani
kenya: kenyan
korea: korean
kosovo: kosovar kosovan
kuwait: kuwaiti
kyrgyzstan: kyrgyz kyrgyzstani
laos: laotian
latvia: latvian
lebanon: lebanese
lesotho: basotho
liberia: liberian
libya: libyan
liechtenstein: liechtensteiner
lithuania: lithuanian
luxembourg: luxembourgish luxembourger
macedonia: macedonian
madagascar: malagasy
malawi: malawian
malaysia: malaysian
maldives: maldivian
mali: malian
malta: maltese
mauritania: mauritanian
mauritius: mauritian
mexico: mexican
moldova: moldovan
monaco: monegasque
mongolia: mongolian
montenegro: montenegrin
morocco: moroccan
mozambique: mozambican
namibia: namibian
naples: neapolitan
nepal: nepali nepalese
netherlands: dutch dutchman netherlander
nicaragua: nicaraguan
niger: nigerien
nigeria: nigerian
norway: norwegian
oman: omani
pakistan: pakistani
palestine: palestinian
panama: panamanian
papua: papuan
paraguay: paraguayan
paris: parisian
persia: persian
peru: peruvian
philippines: filipino filipina
poland: polish
portugal: portuguese
prussia: prussian
qatar: qatari
quebec: quebecois quebecer
rome: roman
romania: romanian rumanian
russia: russian
rwanda: rwandan
samoa: samoan
sardinia: sardinian
scotland: scottish scots scotsman
senegal: senegalese
serbia: serbian serb
sicily: sicilian
singapore: singaporean
slovakia: slovak slovakian
slovenia: slovenian slovene
somalia: somali somalian
spain: spanish spaniard
sudan: sudanese
suriname: surinamese
swaziland: swazi
sweden: swedish swede
switzerland: swiss
syria: syrian
taiwan: taiwanese
tajikistan: tajik
tanzania: tanzanian
tasmania: tasmanian
texas: texan
thailand: thai
tibet: tibetan
togo: togolese
tonga: tongan
trinidad: trinidadian
tunisia: tunisian
turkey: turkish
turkmenistan: turkmen
uganda: ugandan
ukraine: ukrainian
uruguay: uruguayan
uzbekistan: uzbek
venezuela: venezuelan
venice: venetian
vienna: viennese
vietnam: vietnamese
wales: welsh welshman
yemen: yemeni
yugoslavia: yugoslav yugoslavian
zambia: zambian
zimbabwe: zimbabwean
"""


def _table() -> dict[str, str]:
    table: dict[str, str] = {}
    for line in _PLACES.strip().splitlines():
        place, _, words = line.partition(": ")
        for word in words.split():
            table[word] = place
            if not word.endswith(("s", "h", "men", "ese")):
                table[f"{word}s"] = place
    return table


PLACE_OF = _table()
"""A folded word → the place's folded name."""

OTHER_WORDS = frozenset({"polish"})
"""Those that are other words when they begin with a small letter, which a folded text does not tell: as
entities they are their places, as terms they are not ("nail polish" is not about Poland)."""
