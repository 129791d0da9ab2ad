"""Words of the generated sentences: people, companies, places, times and amounts, each drawn from a random stream.

Names are put together from parts, so that a model meets ones at test time that it has never seen.
"""

from collections.abc import Callable
from random import Random

Word = Callable[[Random], str]
"""Draws a word."""


def _words(text: str) -> list[str]:
    return text.split()


_SURNAMES = "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎"
_GIVEN = "伟芳敏静磊洋勇艳杰涛明超霞平刚桂文辉玲健红军雪梅晨宇浩然嘉怡子轩思远若彤志强国栋海燕建华春生立新佳宁书恒"
_CITIES = _words("北京 上海 广州 深圳 杭州 南京 成都 重庆 武汉 西安 长沙 青岛 大连 厦门 昆明 兰州 郑州 济南 福州")
_COUNTIES = _words("云川 平湖 石桥 清溪 长岭 白河 新安 金堂 柳城 双山 永丰 赤水 东关 龙泉 凤台 乐安 临江 江阳 南涧")
_BRAND_FIRST = "星云蓝海金龙华瑞天远中恒东晨北辰绿洲飞鹰万象博雅启明青松九州百川长风银杏云帆木棉朗月"
_BRAND_SECOND = "达通科创盛联信泰源航宏图力维诺邦凯思捷智"
_FIELDS = _words("科技 网络 电子 医药 汽车 能源 食品 传媒 物流 教育 地产 半导体 航空 软件 新材料")
_FIRMS = ["", "公司", "集团", "股份", "有限公司"]
_FUNDS = _words("资本 创投 基金 投资")
_TEAMS = _words("雄狮 猎鹰 海豚 飞虎 骏马 雷霆 火箭手 勇者 灰狼 白鲸 铁骑 山鹰")
_LEAGUES = _words("全国篮球联赛 城市足球杯 亚洲俱乐部杯 排球超级联赛 大学生运动会 冬季冰球赛 乒乓球公开赛 友谊杯")
_CRIMES = _words("受贿罪 贪污罪 盗窃罪 诈骗罪 故意伤害罪 危险驾驶罪 职务侵占罪 非法经营罪 挪用公款罪 寻衅滋事罪")
_POSTS = _words("董事长 总经理 首席执行官 首席财务官 技术总监 副总裁 主教练 市场总监 院长 校长 秘书长 总编辑")
_PRODUCTS = _words("手机 平板电脑 智能手表 电动汽车 无人机 操作系统 游戏 耳机 扫地机器人 翻译机 芯片 相机")
_UNITS = ["万元", "亿元", "万美元", "亿美元"]
_ROUNDS = _words("天使轮 种子轮 A轮 A+轮 B轮 C轮 D轮 战略")
_NUMERALS = "一二三四五六七八九十"
_LATIN = "ABCDEFGHKLMNPRSTXZ"


def person(random: Random) -> str:
    """A surname and one or two characters."""
    return random.choice(_SURNAMES) + "".join(random.sample(_GIVEN, random.choice((1, 2, 2))))


def company(random: Random) -> str:
    """A brand, often its field and its form."""
    brand = random.choice(_BRAND_FIRST) + random.choice(_BRAND_SECOND)
    return brand + random.choice(_FIELDS) + random.choice(_FIRMS)


def fund(random: Random) -> str:
    """An investor."""
    return random.choice(_BRAND_FIRST) + random.choice(_BRAND_SECOND) + random.choice(_FUNDS)


def organisation(random: Random) -> str:
    """A company, a club, a school or a hospital."""
    city = random.choice(_CITIES)
    return random.choice(
        [company(random), company(random), f"{city}大学", f"{city}第{random.choice(_NUMERALS)}医院", team(random)]
    )


def team(random: Random) -> str:
    """A club of a city."""
    return random.choice(_CITIES) + random.choice(_TEAMS) + random.choice(["队", "俱乐部", ""])


def league(random: Random) -> str:
    """A competition."""
    return random.choice(["", f"{random.randint(2015, 2025)}年"]) + random.choice(_LEAGUES)


def place(random: Random) -> str:
    """A city or a county of one."""
    return random.choice([random.choice(_CITIES), random.choice(_CITIES) + random.choice(_COUNTIES) + "县"])


def court(random: Random) -> str:
    """A court of law."""
    return place(random) + random.choice(["人民法院", "中级人民法院", "法院"])


def time(random: Random) -> str:
    """A date, full or relative."""
    month, day = random.randint(1, 12), random.randint(1, 28)
    return random.choice(
        [
            f"{random.randint(2010, 2025)}年{month}月{day}日",
            f"{month}月{day}日",
            f"{day}日{random.choice(['上午', '下午', '晚间', '凌晨'])}",
            f"去年{month}月",
            random.choice(["昨日", "今天上午", "本周三", "上周五", "近日", "当地时间周一"]),
        ]
    )


def money(random: Random) -> str:
    """An amount with its currency."""
    number = random.choice([str(random.randint(2, 980)), f"{random.randint(1, 99)}.{random.randint(1, 9)}"])
    return random.choice(["", "", "约", "超过"]) + number + random.choice(_UNITS)


def people_count(random: Random) -> str:
    """A number of people."""
    return random.choice(["", "约", "近"]) + str(random.randint(2, 900)) + random.choice(["人", "名员工", "余人"])


def casualties(random: Random) -> str:
    """A number of people hurt."""
    return f"{random.randint(1, 300)}人" + random.choice(["", random.choice(["受伤", "遇难"])])


def prison_term(random: Random) -> str:
    """A number of years."""
    years = random.choice([str(random.randint(1, 20)), random.choice(_NUMERALS)])
    return random.choice(["", "有期徒刑"]) + years + "年" + random.choice(["", "", "六个月"])


def magnitude(random: Random) -> str:
    """A magnitude of an earthquake."""
    return f"{random.randint(3, 7)}.{random.randint(0, 9)}级"


def score(random: Random) -> str:
    """A result of a match, the winner's figure first."""
    loser = random.randint(0, 98)
    return f"{loser + random.randint(1, 20)}{random.choice(['比', ':', '-'])}{loser}"


def product(random: Random) -> str:
    """A product, sometimes with its model's name."""
    model = random.choice(_LATIN) + str(random.randint(1, 99))
    return random.choice(["", "新款", "首款"]) + random.choice(_PRODUCTS) + random.choice(["", model])


def _one_of(words: list[str]) -> Callable[[Random], str]:
    return lambda random: random.choice(words)


crime, post, funding_round = _one_of(_CRIMES), _one_of(_POSTS), _one_of(_ROUNDS)
